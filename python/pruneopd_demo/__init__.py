"""A demonstration on real models: a teacher, students cut from it, and how far each is trusted along its responses.

Run it with `python -m pruneopd_demo [--model-dir DIR] [--out runs/demo]`.
"""
