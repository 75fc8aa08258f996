"""Tools that measure, and are no tests; tests run the short ones.

`nox -s bench` (`python -m tests.bench`): speed and memory beside the peers'; `python -m tests.bench gpu`: what matters
on a GPU, in minutes. `nox -s recipe`: what each choice of the recipe is worth. `nox -s faults`: a hundred kills of each
training. `nox -s saving`: what a checkpoint costs. `nox -s two_machines`: a network that is cut. `python -m
tests.bench.trip` and `.code_size`: how much there is to read. `python -m tests.bench.solvers` and `.adversarial`:
studies that the recipe's page reports.
"""
