// A stage of shared memory holds one chunk with its scales and the activations of TOKENS tokens, and is filled by the copy
// engine or, before Hopper, by all threads; what a last chunk has beyond k are zeros, or weights that meet zeros.
constexpr int WEIGHTS = CODES + METADATA, ACTIVATIONS = SEGMENTS * TOKENS * 256, FILLED = WEIGHTS + ACTIVATIONS + SCALES;
constexpr int STAGE = (FILLED + PATTERN - 1) / PATTERN * PATTERN;
