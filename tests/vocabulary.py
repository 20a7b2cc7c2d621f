"""How many token ids the tiny models know: in a module of its own, which imports nothing."""

VOCAB_SIZE = 384  # of the models; the tokenizer has fewer, so some ids decode to nothing
