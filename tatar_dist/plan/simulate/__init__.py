"""Predict a GRPO step's cost on other hardware: `plan --simulate`. Without torch or Ray.

measured.py   run directories -> StepCosts, by non-negative least squares
costs.py      StepCosts: seconds per unit of work of each part of a step; from YAML
estimate.py   a card's data sheet, FLOPs and bytes -> StepCosts
step.py       StepCosts, a split and completion lengths -> the seconds of one step, event by event
forecast.py   the command: configuration and StepCosts -> the best split learners/engines for each number of GPUs
"""

from typing import Literal

CardName = Literal["H200", "H100", "A100", "L40S", "4090"]  # those that can be estimated for
