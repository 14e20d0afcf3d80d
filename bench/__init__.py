"""Benchmarks that carry their own proof: every row was checked against fp32 or fp64 in the run that timed it.

    sana bench image     whole pictures, stage by stage, beside diffusers, torch.compile and the reference
    sana bench kernels   one op at a time, on the shapes of the published models
    sana bench quality   what a precision costs in pictures, and whether they show what was asked for
    sana bench compare   two result files, row by row

`python -m sana_bench.report README.md` writes the tables of a Markdown file from the result files.
"""
