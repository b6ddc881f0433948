"""The maths: torch and nothing else. One file a method, and a line each in SAID and in methods.METHODS."""

# these use calibration samples; the others need no model
NEEDS_MODEL = {"ziplora", "regmean", "ssr"}
# these take gradient steps
BY_STEPS = {"ziplora"}

# what each is, in a few words, and when to take it, by the rows of benchmarks/results/quality-main.json
SAID = {
    "ziplora": "begins as ssr, and learns a coefficient for every input column; for lightly and for strongly trained LoRAs",
    "direct": "the plain sum; as good for lightly trained LoRAs at ordinary guidance",
    "ssr": "least squares among the ranks, layer by layer: faster; for some strong LoRAs, not for light ones",
    "regmean": "least squares over all matrices, layer by layer; likewise",
}

# how steps get along with less memory, from the fastest on
MODES = {
    "fast": "keeps all of a pass for its backward",
    "checkpointing": "computes the UNet's blocks again in the backward, which makes a step half as long again",
    "offload": "likewise, with the blocks' weights in main memory while others run",
}
