// A stage of shared memory holds one chunk, 128 rows of k of 256 features, their scales and the activations of TOKENS
// tokens, and is filled by the copy engine or, before Hopper, by all threads; of a last chunk of 64 rows the rest are
// zeros, or weights that meet zeros.
constexpr int SEGMENTS = 4 / COLUMNS;  // of a chunk, of 128 rows of k each
constexpr int WEIGHTS = CODES + METADATA, ACTIVATIONS = SEGMENTS * TOKENS * 256, FILLED = WEIGHTS + ACTIVATIONS + SCALES;
constexpr int STAGE = (FILLED + PATTERN - 1) / PATTERN * PATTERN;
