"""A campaign of mutants against every format that is read; `make fuzz`, or campaign.py says more.

mutants.py   how bytes, JSON and texts are changed
formats.py   valid files of every format, and how a mutant is used
campaign.py  workers under limits, counts, the log
"""

import os

# Before numpy and tokenizers are imported: the campaign forks its workers, so there must be no threads.
for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
