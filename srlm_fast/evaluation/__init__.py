"""Evaluations of models outside the loop: answers, comparisons, benchmark files, ratings (scripts/evaluate.py).

run.py       what all tasks share: processes, run folder, models, the engine
answers.py   answers to a file of prompts; AlpacaEval's model_outputs.json
compare.py   two models, answer by answer
mt_bench.py  MT-Bench: conversations, and their ratings by a judge
judging.py   a judge against ranked or scored replies
tasks.py     which task needs what; one evaluation from its configuration to its results
"""
