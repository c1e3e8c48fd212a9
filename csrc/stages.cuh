// A stage of shared memory holds one chunk, 128 rows of k of 256 features, their scales and the activations of TOKENS
// tokens, and is filled by the copy engine or, before Hopper, by all threads; of a last chunk of 64 rows the rest are
// zeros, or weights that meet zeros.
constexpr int WEIGHTS = CODES + METADATA, FILLED = WEIGHTS + TOKENS * 256 + SCALES;
constexpr int STAGE = (FILLED + PATTERN - 1) / PATTERN * PATTERN;
