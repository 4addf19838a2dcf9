"""Any folder, list, sequence or shard is counted, named and opened by index."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset
from webdataset import TarWriter

from pixel_level_contrastive_learning.data.decoding import open_image
from pixel_level_contrastive_learning.data.image import ImageError, LazyImage
from pixel_level_contrastive_learning.data.shards import ShardSource, images_in, is_shards
from pixel_level_contrastive_learning.data.sources import FileSource, Source, Subset, open_source
from pixel_level_contrastive_learning.data.tiles import find_rasters


def paint(path: Path, value: int = 0) -> Path:
    """A PNG of one value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 3), value).save(path)
    return path


def values(source: Source) -> list[float]:
    """The first value of each image."""
    return [float(source.open(index).read()[0, 0, 0]) for index in range(len(source))]


def names(source: Source, folder: Path) -> list[str]:
    return [os.path.relpath(source.name(index), folder) for index in range(len(source))]


def test_a_folder_is_searched_through(tmp_path) -> None:
    placed = "b.PNG", "a/é ü.png", "a/b/c/日本.png", ".hidden.png", "x/.y/z.png"
    for value, name in enumerate(placed):
        paint(tmp_path / name, value)
    (tmp_path / "notes.txt").write_text("no image")
    paint(tmp_path.parent / f"{tmp_path.name}-other" / "linked.png", 9)
    (tmp_path / "link").symlink_to(tmp_path.parent / f"{tmp_path.name}-other")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    for place in (tmp_path, str(tmp_path)):
        source = open_source(place)
        assert names(source, tmp_path) == [
            "a/b/c/日本.png",
            "a/é ü.png",
            "b.PNG",
            "link/linked.png",
        ]
        assert values(source) == [2, 1, 0, 9]


def test_runs_below_a_folder_are_not_searched(tmp_path) -> None:
    run = tmp_path / "slides" / "run"
    for value, name in enumerate(("a.png", "checkpoints/b.png", "run/pictures/c.png")):
        paint(tmp_path / "slides" / name, value)
    (tmp_path / "slides" / "config.yaml").touch()  # named itself, it is searched
    assert values(open_source(tmp_path / "slides")) == [0, 1, 2]
    (run / "checkpoints").mkdir()
    assert values(open_source(tmp_path / "slides")) == [0, 1, 2]  # no run yet
    (run / "config.yaml").touch()
    assert values(open_source(tmp_path / "slides")) == [0, 1]
    assert values(open_source(run / "pictures")) == values(open_source(run)) == [2]


def test_features_and_previews_below_a_folder_are_not_searched(tmp_path) -> None:
    """Also of a dry run, which leaves nothing else; what only has such a name is searched."""
    for value, name in enumerate(
        ("a.png", "b/preview/mine.png", "c/d.png", "f/pictures/0.png", "r/preview/pairs-0.png")
    ):
        paint(tmp_path / name, value)
    (tmp_path / "f" / "maps").mkdir()
    for folder in ("c", "f"):
        (tmp_path / folder / "features.json").touch()
    assert values(open_source(tmp_path)) == [0, 1, 2]
    assert values(open_source(tmp_path / "f")) == [3]
    assert values(open_source(tmp_path / "r/preview")) == [4]


def test_masks_beside_images_are_no_images(tmp_path, caplog) -> None:
    caplog.set_level("INFO")
    for name in ("images/a.png", "masks/a.png", "predictions/0.png", "other/masks/b.png"):
        paint(tmp_path / "set" / name)
    (tmp_path / "set" / "notes.xcf").touch()
    assert names(open_source(tmp_path), tmp_path) == ["set/images/a.png", "set/other/masks/b.png"]
    for name in ("masks", "predictions"):
        assert f"{tmp_path / 'set' / name} belongs to the images next to it" in caplog.text
    assert f"left out of {tmp_path}: other files: 1, by ending: 1 .xcf" in caplog.text


def test_a_name_that_is_no_text_can_be_read(tmp_path) -> None:
    paint(tmp_path / "a.png", 7).rename(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))
    assert values(open_source(tmp_path)) == [7]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])  # the second as PowerShell writes
def test_a_list_names_paths_beside_it(tmp_path, encoding) -> None:
    paint(tmp_path / "images" / "ä.png", 1)
    other = paint(tmp_path / "b.png", 2)
    (tmp_path / "list.txt").write_text(f"images/ä.png\n\n {other} \n", encoding=encoding)
    assert values(open_source(tmp_path / "list.txt")) == [1, 2]


def test_several_places_are_joined(tmp_path) -> None:
    for value, name in enumerate(("one/a.png", "one/b.png", "two/c.png")):
        paint(tmp_path / name, value)
    with TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "d", "png": (tmp_path / "two/c.png").read_bytes()})
    places = [tmp_path / "two", str(tmp_path / "one")]
    for source in (open_source(places), open_source([*places, f"{tmp_path}/a.tar"])):
        assert values(source) == [2, 0, 1, 2][: len(source)]
        assert Path(source.name(2)).name == "b.png"
        assert values(Subset(source, torch.tensor([2, 0]))) == [1, 2]


def test_a_file_is_an_image_once_however_often_it_is_named(tmp_path, caplog) -> None:
    caplog.set_level("INFO")
    for value, name in enumerate(("a.png", "sub/b.png")):
        paint(tmp_path / name, value)
    (tmp_path / "link").symlink_to(tmp_path / "sub")
    (tmp_path / "list.txt").write_text("a.png\nsub/../a.png\nlink/b.png\nsub/b.png\n")
    with TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "d", "png": (tmp_path / "a.png").read_bytes()})
    for places, again in (
        (["", "sub"], "1 file"),
        (["sub", "a.png", "a.tar", "", "link"], "3 files"),
        (["list.txt"], "2 files"),
    ):
        caplog.clear()
        source = open_source([tmp_path / place for place in places])
        assert sorted(values(source)) == [0, 0, 1][-2 - ("a.tar" in places) :]
        assert f"named again, but read once: {again}\n" in caplog.text
    assert find_rasters([tmp_path / "sub", tmp_path / "link"]) == [f"{tmp_path}/sub/b.png"]


def test_an_image_is_found_without_counting_all_of_them(tmp_path, monkeypatch) -> None:
    path, several = paint(tmp_path / "a.png", 7), tmp_path / "b.gif"
    frames = [Image.new("L", (9, 9), value) for value in range(3)]
    frames[0].save(several, save_all=True, append_images=frames[1:])
    with TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "a", "png": path.read_bytes()})
    copies = [path.with_name(f"{number}.png") for number in range(50)]
    for copy in copies:
        os.link(path, copy)
    many = open_source([*copies, several])
    assert isinstance(many, FileSource)
    joined = open_source([path, several, f"{tmp_path}/a.tar", copies[0]])
    asked = []
    monkeypatch.setattr(ShardSource, "files", property(lambda _: asked.append(1) or 1))
    monkeypatch.setattr(many, "split", {})
    assert (len(many), len(joined)) == (53, 6)
    assert joined.name(4) == f"{tmp_path}/a.tar:a.png"
    assert joined.name(5) == str(copies[0])
    assert asked == []


@pytest.mark.parametrize(
    "item",
    [
        torch.full((3, 4, 5), 7, dtype=torch.uint8),
        torch.full((4, 5), 7.0),
        torch.full((4, 5), 7.0, dtype=torch.bfloat16),
        np.full((4, 5, 3), 7, np.uint8),
        np.full((4, 5), 7, np.uint16),
        Image.new("RGB", (5, 4), (7, 7, 7)),
        Image.new("I;16", (5, 4), 7),
        (torch.full((1, 4, 5), 7, dtype=torch.uint8), "a label"),
    ],
)
def test_items_may_be_tensors_arrays_or_pictures(item) -> None:
    source = open_source([item, item])
    assert len(source) == 2
    assert source.name(1) == "item 1"
    opened = source.open(1)
    pixels = opened.read()
    assert opened.size == (4, 5)
    assert opened.channels == len(pixels)
    assert pixels.dtype == (torch.float32 if opened.high_depth else torch.uint8)
    assert pixels.unique().tolist() == [7]


def test_a_torch_dataset_is_a_source() -> None:
    source = open_source(TensorDataset(torch.arange(6, dtype=torch.uint8).view(3, 1, 1, 2)))
    assert values(source) == [0, 2, 4]


def test_a_source_of_your_own_stays_as_it_is() -> None:
    class Own:
        def __len__(self) -> int:
            return 1

        def name(self, index: int) -> str:
            return f"own {index}"

        def content(self, index: int) -> bytes:
            return png(7)

        def open(self, index: int) -> LazyImage:
            return open_image(self.content(index))

    source = Own()
    assert open_source(source) is source
    nothing = open_source(open_source([torch.tensor([[7.0, 8.0]])]), nodata=7)
    assert nothing.open(0).decode().known.tolist() == [[[False, True]]]


def test_the_channels_of_a_tensor_stand_first_whatever_the_sides() -> None:
    assert open_source([torch.zeros(9, 4, 5)]).open(0).channels == 9
    with pytest.raises(
        ImageError, match=r"shape \(16, 20, 3\); .* so give item.permute\(2, 0, 1\)"
    ):
        open_source([torch.zeros(16, 20, 3)]).open(0)


def test_items_that_cannot_be_used_say_why() -> None:
    class Rotten(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> object:
            if index:
                raise KeyError("gone")
            return "text"

    cut_off = io.BytesIO()
    Image.effect_noise((40, 40), 90).save(cut_off, "PNG")
    with pytest.raises(ImageError, match=r"^OSError: image file is truncated"):
        open_source([Image.open(io.BytesIO(cut_off.getvalue()[:900]))]).open(0)
    with pytest.raises(ImageError, match=r"^TypeError: can't convert Sparse"):
        open_source([torch.zeros(3, 4, 5).to_sparse()]).open(0)
    source = open_source(Rotten())
    with pytest.raises(ImageError, match=r"^an item is a str; it must be a tensor"):
        source.open(0)
    with pytest.raises(ImageError, match=r"^KeyError: 'gone'"):
        source.open(1)


def test_a_file_that_vanished_or_is_forbidden_is_unreadable(tmp_path) -> None:
    paint(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "c.png").mkdir()
    paint(tmp_path / "c.png" / "d.png")
    source = open_source(tmp_path)
    assert len(source) == 3
    with pytest.raises(ImageError, match=r"^No such file or directory$"):
        source.open(1)
    (tmp_path / "a.png").unlink()
    with pytest.raises(ImageError, match=r"^No such file or directory$"):
        source.open(0)


def test_nothing_usable_is_told_at_once(tmp_path) -> None:
    with pytest.raises(
        ValueError, match=r"no image in .*: searched it and its subfolders for files that end"
    ):
        open_source(tmp_path)
    for name in ("a.doc", "b.doc", "sub/c.csv", "noending"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    with pytest.raises(ValueError) as error:
        open_source(tmp_path)
    assert ".apng, .avif, .bmp, .dcm, .dicom, .gif, .heic, .heif, .ima, .jfif, .jpeg" in str(
        error.value
    )
    assert "found other files: 4, by ending: 2 .doc, " in str(error.value)
    for data, text in {
        str(tmp_path / "gone"): "does not exist; name a folder of images",
        (): "data is empty",
        "": "data is '', perhaps a variable that is not set; name a folder",
        ("", tmp_path): "data is ''",
        7: "data is a int; it must be a folder",
    }.items():
        with pytest.raises(ValueError, match=text):
            open_source(data)
    with pytest.raises(ValueError, match=r"data is a generator; .* pass list\(...\) of it"):
        open_source(image for image in ())
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(ValueError, match=r"a list without paths"):
        open_source(tmp_path / "empty.txt")
    (tmp_path / "folders.txt").write_text("sub\n")
    with pytest.raises(ValueError, match=r"a list that begins with the folder .*sub'; name folder"):
        open_source(tmp_path / "folders.txt")
    (tmp_path / "bytes.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"neither an image by its ending nor a text file"):
        open_source(tmp_path / "bytes.bin")


# Shards.


def png(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (4, 3), value).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three shards of two images each, of the values 0 to 5."""
    for shard in range(3):
        with TarWriter(str(tmp_path / f"part-{shard:02d}.tar")) as writer:
            for i in (2 * shard, 2 * shard + 1):
                writer.write({"__key__": f"sub/{i}", "png": png(i), "json": b"{}", "cls": b"3"})
    return tmp_path


def test_shards_are_read_in_any_order(folder) -> None:
    source = open_source(str(folder / "part-{00..02}.tar"))
    assert values(source) == [0, 1, 2, 3, 4, 5]
    assert source.name(3) == f"{folder}/part-01.tar:sub/3.png"
    assert values(Subset(source, torch.tensor([5, 0, 3]))) == [5, 0, 3]
    assert len(open_source(str(folder / "part-01.tar"))) == 2


def test_a_folder_of_shards_needs_no_pattern(folder) -> None:
    assert values(open_source(folder)) == [0, 1, 2, 3, 4, 5]


def test_a_shard_is_read_once_however_often_it_is_named(folder, tmp_path, caplog) -> None:
    first = folder / "part-00.tar"
    (folder / "link").symlink_to(folder)
    for data in ([first, folder], [folder, folder / "link" / first.name], [folder, folder]):
        assert sorted(values(open_source(data))) == [0, 1, 2, 3, 4, 5]
    assert values(open_source(f"{first}::{first}")) == [0, 1]
    assert values(open_source([first, paint(tmp_path / "own.png", 9), first])) == [0, 1, 9]


def test_a_shard_of_labels_among_those_of_images_is_left_out(folder, caplog) -> None:
    with TarWriter(str(folder / "labels.tar")) as writer:
        writer.write({"__key__": "0", "cls": b"3"})
    source = open_source(folder)
    assert values(source) == [0, 1, 2, 3, 4, 5]
    assert source.name(3) == f"{folder}/part-01.tar:sub/3.png"
    assert f"{folder}/labels.tar holds no image and is left out" in caplog.text
    for shard in folder.glob("part-*.tar"):
        shard.unlink()
    with pytest.raises(ValueError, match=r"no image in 1 shard \('"):
        open_source(folder)


def test_shards_named_by_url_are_downloaded_once(folder, tmp_path, monkeypatch) -> None:
    url = f"pipe:cat {folder}/part-{{00..02}}.tar"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIXELCL_ALLOW_COMMANDS", "1")
    cache = tmp_path / "home" / "pixelcl" / "shards"
    assert values(open_source(url)) == [0, 1, 2, 3, 4, 5]
    assert len(list(cache.iterdir())) == 3
    (folder / "part-00.tar").unlink()
    assert len(open_source(url)) == 6
    with pytest.raises(ValueError, match=r"cannot download the shard 'pipe:cat /nowhere/x.tar'"):
        open_source("pipe:cat /nowhere/x.tar")
    for length in (4000, 6144, 6244):  # in a sample, after the first, in a header
        with pytest.raises(ValueError, match=r"cannot download the shard .pipe:head"):
            open_source(f"pipe:head -c {length} {folder}/part-01.tar")
    assert len(list(cache.iterdir())) == 3  # nothing half downloaded is left


@pytest.mark.parametrize("scheme", ["pipe:", "PIPE:", "pi\tpe:", " pipe:"])
def test_no_command_is_run_unasked(scheme, tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("PIXELCL_ALLOW_COMMANDS", raising=False)
    with pytest.raises(ValueError, match="a command that a shell would run, and it was not run"):
        open_source(f"{scheme}touch {tmp_path}/run://x.tar")
    assert not (tmp_path / "run:").exists()


def test_shards_that_are_cut_off_give_what_they_have(folder, caplog) -> None:
    path = folder / "part-00.tar"
    _, start, length = ShardSource([str(path)]).positions[0].tolist()
    with path.open("r+b") as file:
        file.truncate(start + length + 700)
    source = ShardSource([str(path)])
    assert len(source) == 1
    assert "is cut off after 1 image;" in caplog.text
    with path.open("r+b") as file:
        file.truncate(int(source.positions[-1, 1]) + 10)
    with pytest.raises(ImageError, match=r"^the file ends after 10 of"):
        source.open(len(source) - 1)
    path.unlink()
    with pytest.raises(ImageError, match=r"^No such file or directory$"):
        source.open(0)


def test_masks_beside_images_in_a_shard_are_no_images(folder, caplog) -> None:
    caplog.set_level("INFO")
    shown, hidden = ("a.jpg.png", "b/a.seg.png", "c.label.png"), ("b/d.Mask.PNG", "b/d.seg.png")
    with tarfile.open(folder / "masks.tar", "w") as tar:
        for name in ("b/d.rgb.png", *shown, *hidden):
            tar.add(paint(folder / "x/a.png"), name)
    source = ShardSource([f"{folder}/masks.tar"])
    assert [source.names[i] for i in range(len(source))] == ["b/d.rgb.png", *shown]
    assert "left out: 2 masks next to images of the same key in shards" in caplog.text


def test_a_damaged_header_in_a_shard_is_told(folder, caplog) -> None:
    path = folder / "part-00.tar"
    with tarfile.open(path) as tar:
        header = tar.getmember("sub/1.json").offset
    with path.open("r+b") as file:
        file.seek(header + 148)  # its checksum
        file.write(b"9")
    assert values(ShardSource([str(path)])) == [0]
    assert f"{path} has a damaged header at byte {header}, after 1 image; what" in caplog.text
    with pytest.raises(ValueError, match="has a damaged header at byte"):
        images_in(str(path), whole=True)


def test_shards_that_were_joined_are_read_to_the_end(folder, caplog) -> None:
    paths = sorted(folder.glob("*.tar"))
    (folder / "all.tar").write_bytes(b"".join(path.read_bytes() for path in paths))
    assert values(ShardSource([f"{folder}/all.tar"])) == [0, 1, 2, 3, 4, 5]
    assert caplog.text == ""


def test_hard_links_in_a_shard_are_images(folder, caplog) -> None:
    with tarfile.open(folder / "links.tar", "w") as tar:
        tar.add(paint(folder / "x/a.png", 7), "a.png")
        for name, target in (("b.png", "a.png"), ("c.png", "gone")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.LNKTYPE, target
            tar.addfile(link)
    assert values(ShardSource([f"{folder}/links.tar"])) == [7, 7]
    assert "left out: 1 hard link to no earlier image" in caplog.text


def test_what_is_no_shard_is_refused(tmp_path) -> None:
    (tmp_path / "text.tar").write_text("no tar at all")
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.png"), io.BytesIO())
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    for name, text in {
        "text.tar": "is not a tar file that can be read",
        "packed.tar": "shards must be whole and not compressed",
        "empty.tar": "no image in 1 shard",
        "gone.tar": r"no shard at .*; a pattern looks like shards-\{000000..000099\}.tar",
    }.items():
        with pytest.raises(ValueError, match=text):
            open_source(str(tmp_path / name))
    assert is_shards("https://example.org/x-{000..009}.tar")
    assert not is_shards("images")


def test_shards_are_found_as_images_are(tmp_path) -> None:
    with TarWriter(str(tmp_path / "far.TAR")) as writer:
        writer.write({"__key__": "a", "png": paint(tmp_path / "x/a.png", 7).read_bytes()})
    (tmp_path / "here").mkdir()
    for name in ("s.TAR", "deep/t.tar"):
        path = tmp_path / "elsewhere" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((tmp_path / "far.TAR").read_bytes())
    (tmp_path / "here" / "link").symlink_to(tmp_path / "elsewhere")
    assert values(open_source(tmp_path / "here")) == [7, 7]


def test_a_folder_can_be_left_out(tmp_path) -> None:
    paint(tmp_path / "a.png", 1)
    paint(tmp_path / "run" / "deep" / "b.png", 2)
    for out in (tmp_path / "run", str(tmp_path / "run" / ".." / "run")):
        assert values(open_source([tmp_path], leave_out=out)) == [1]
    assert values(open_source(tmp_path, leave_out=tmp_path / "not there")) == [1, 2]


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])  # as editors on Windows begin a file
def test_a_list_may_hold_any_name(tmp_path, start) -> None:
    names = [b"\xe9.png", "ü.pnm".encode(), "a\x85b\u2028c\x0b.png".encode()]
    for value, name in enumerate(names):
        Image.new("L", (4, 3), value).save(tmp_path / os.fsdecode(name), "PPM")
    (tmp_path / "list.txt").write_bytes(start + b" \r\n".join([*names, b""]))
    assert values(open_source(tmp_path / "list.txt")) == [0, 1, 2]


def test_pipes_and_devices_are_told_and_passed_over(tmp_path, caplog) -> None:
    paint(tmp_path / "a.png", 3)
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to("/dev/zero")
    (tmp_path / "list.txt").write_text("a.png\nb.png\nc.png\n")
    assert values(open_source(tmp_path)) == [3]
    for name in ("b.png", "c.png"):
        assert f"{tmp_path / name} is a pipe, a socket or a device: left out" in caplog.text
    listed = open_source(tmp_path / "list.txt")
    for place, index in ((listed, 1), (listed, 2), (open_source(tmp_path / "b.png"), 0)):
        with pytest.raises(ImageError, match=r"^a pipe, a socket or a device, and not a file$"):
            place.open(index)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="which cannot be read: a pipe, a socket or a device"):
        open_source(tmp_path / "pipe")
