"""A run folder written by version 1.0.0.dev0 before its trainer was rewritten still resumes.

`stored_run/run` was killed in step 8 of 12 and has a checkpoint of step 5; `final.safetensors` is
the backbone that the same code reached without the kill. Never make them anew from later code.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from pixel_level_contrastive_learning import pretrain

STORED = Path(__file__).parent / "stored_run"


def draw_images(folder: Path) -> str:
    """The sixteen images of the stored run, by whole-number arithmetic alone."""
    folder.mkdir()
    y, x = np.mgrid[:40, :56]
    for n in range(16):
        planes = [
            (x * (n + 3 * c + 1) + y * (2 * n + c + 3) + x * y // (c + 2)) % 256 for c in range(3)
        ]
        Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8)).save(folder / f"{n:02d}.png")
    return str(folder)


def test_a_run_stored_before_resumes_to_the_same_weights(tmp_path) -> None:
    run = shutil.copytree(STORED / "run", tmp_path / "run")
    os.link(run / "checkpoints" / "step-00000005.ckpt", run / "checkpoints" / "last.ckpt")
    model = f"{shutil.copy(STORED / 'nets.py', tmp_path)}:tiny"
    result = pretrain(draw_images(tmp_path / "images"), run, model=model, resume=True)

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[:5] == [
        json.loads(line) for line in (STORED / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    expected = load_file(STORED / "final.safetensors")
    weights = result.backbone.state_dict()
    # Another CPU or torch rounds sums otherwise. Before batch norm a bias has no gradient but this
    # rounding, by which Adam takes whole steps: these and the means that hold them may be anything.
    for name in expected.keys() - {"0.bias", "4.bias", "1.running_mean", "5.running_mean"}:
        torch.testing.assert_close(weights[name], expected[name], rtol=1e-3, atol=1e-5)
