"""How many images an evaluation takes."""

DEFAULT_SEEDS, QUICK_SEEDS, MAX_SEEDS = 50, 8, 1000  # images of each digit
STYLE_SEEDS = 20  # upper limit; 200 pairs give a standard error of a few hundredths of the effect
