// What lies where in a chunk: COLUMNS of 64 features by SEGMENTS of 128 rows of k, of which only narrow.cu's chunks have
// more than one. It is of the MARLIN layout or, with SPARSE, of the Sparse-MARLIN layout, which holds two of every four rows
// and which two they are. A lane has 16 bytes of each column, a word of four for every fragment of 16 features.
constexpr int PIECES = SEGMENTS * COLUMNS;
constexpr int STEPS = SPARSE ? 4 : 8;                      // of a segment: 16 rows that are held, of 32 or of 16
constexpr int CODES = STEPS * 512 * PIECES;                // bytes
constexpr int METADATA = SPARSE ? 1024 * PIECES : 0;       // bytes: a word for every lane and two fragments
constexpr int GROUPS = GROUP ? 128 / GROUP : 1;            // of scales, per segment
constexpr int GROUP_STEPS = STEPS / GROUPS;
constexpr int SCALES = GROUP ? 128 * GROUPS * PIECES : 0;  // bytes

// Which of 64 features is row `half` * 8 + lane / 4 of a fragment.
__device__ __forceinline__ int feature_in_column(int fragment, int half, int lane) {
  return SPARSE ? 8 * (lane / 4) + 4 * half + fragment : 16 * fragment + 8 * half + lane / 4;
}
// Where the scale of a feature is if there is one for all of k: inside 32 features, 8 i + 2 m + e holds 2 i + e + 8 m.
__device__ __forceinline__ int place_of_scale(int feature) {
  const int r = feature % 32;
  return SPARSE ? feature : (feature & ~31) + 8 * (r % 8 / 2) + 2 * (r / 8) + r % 2;
}
// Where in a stage a step of codes, and a row of scales, of a column of 64 features are: rows of a tile's COLUMNS, or of
// PAIRED's two of gate, and then those of up.
constexpr int CODES_ROW = PAIRED ? 1024 : 512 * COLUMNS, SCALES_ROW = PAIRED ? 256 : 128 * COLUMNS;
__device__ __forceinline__ int codes_at(int column) { return PAIRED ? column / 2 * (CODES / 2) + column % 2 * 512 : column * 512; }
__device__ __forceinline__ int scales_at(int column) { return PAIRED ? column / 2 * (SCALES / 2) + column % 2 * 128 : column * 128; }
