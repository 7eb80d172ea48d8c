"""A study: the loop with several configurations (arms) and seeds, measured and compared.

    arms.py         what is run: a YAML file of arms, each a change of one configuration
    run.py          every arm with every seed, each in a run folder of its own; started again it goes on
    measure.py      what a finished run is reduced to (study.json)
    statistics.py   means over seeds with intervals, paired differences
    report.py       the page of results;  figures.py   its plots

`scripts/paper.py` is the command, `configs/miniature.yaml` the paper's own comparisons on the embedded world.
"""
