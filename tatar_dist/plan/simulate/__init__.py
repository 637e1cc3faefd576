"""Predict the cost of a GRPO step on other hardware: `tatar-dist plan --simulate`. No torch, no Ray.

measured.py   run directories -> StepCosts, by non-negative least squares
costs.py      StepCosts: seconds per unit of work of every part of a step; read from YAML or the two others
estimate.py   configuration -> StepCosts, from FLOPs and bytes without measurement, marked as an estimate
step.py       StepCosts, a split and completion lengths -> the seconds of one step, event by event
search.py     configuration and StepCosts -> the best split learners/engines for each number of GPUs
command.py    the command and its tables
"""
