"""The embedded default (`model=tiny`): a student and a teacher small enough to ship and to train on a laptop.

`student/` and `teacher/` are ordinary transformers folders that `tools/pretrain.py` made; `README.md` is their card.
"""
