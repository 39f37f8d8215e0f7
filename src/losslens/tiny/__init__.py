"""The embedded default (`model=tiny`): a student and a teacher small enough to ship and to train on a laptop.

`student/` and `teacher/` are ordinary transformers folders; `pretrain.py` made them; `README.md` is their model card.
"""
