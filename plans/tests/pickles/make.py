"""Writes the pickled plans in this folder. Needs PyTorch for those that torch.save writes.

python plans/tests/pickles/make.py
"""

import io
import pickle
import zipfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
# As the authors' transform writes it: one entry per block, in it one method per step.
PLAN = [
    {
        "attn1": ["full_attn", "residual_window_attn+cfg_attn_share", "output_share", "full_attn"],
        "attn2": None,
        "ff": None,
    },
    {
        "attn1": ["full_attn", "full_attn+cfg_attn_share", "residual_window_attn", "output_share"],
        "attn2": None,
        "ff": None,
    },
    {"attn1": ["full_attn"] * 4, "attn2": None, "ff": None},
]

for protocol in range(6):
    (HERE / f"protocol-{protocol}.pkl").write_bytes(pickle.dumps(PLAN, protocol))

torch.save(PLAN, HERE / "torch.pt")
torch.save(PLAN, HERE / "torch-legacy.pt", _use_new_zipfile_serialization=False)

deflated = io.BytesIO()
with zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as archive:
    entry = zipfile.ZipInfo("plan/data.pkl", date_time=(2024, 1, 1, 0, 0, 0))
    entry.compress_type = zipfile.ZIP_DEFLATED
    archive.writestr(entry, pickle.dumps(PLAN, 2))
(HERE / "deflated.zip").write_bytes(deflated.getvalue())
