"""Speed and memory of the operators: `python -m bench --help`.

operators.py   every operator once: its inputs, the same in eager PyTorch, what its kernels do
measure/       what is timed, and how: one timing protocol, one measurement of memory
count/         instructions, in the machine code and executed, and the times that they predict
report/        rows of results, tables for people, targets
results/       the saved rows, a file for each machine
"""
