// Of a tile of tokens, all that go to its expert: `count` rows from `row` on, in `tiles` tiles of tokens from `tile` on.
struct __align__(16) Batch { int expert, tile, tiles, row, count, unused[3]; };

// Which experts tokens go to, and where what follows from it is put.
struct Routing {
  const void* index;  // (m, choices): an expert of each token; any other number is none
  const int* here;    // null, or which of the experts here each of all `experts` is, or -1
  int* rows;          // of every place in the order of the experts its token
  int* places;        // (m, choices): the place of a token's choice, or -1
  Batch* batches;     // of every tile of tokens
  int* token_tiles;   // how many these are
  int slots, choices, experts, count;  // choices in all; of a token; experts that index knows; experts here
  int tokens, wide;   // of a tile; index is int64
  __device__ __forceinline__ int expert(int slot) const {
    if (slot >= slots) return -1;
    long long e = wide ? ((const long long*)index)[slot] : ((const int*)index)[slot];
    if (e < 0 || e >= experts) return -1;
    if (here) e = here[e];
    return e < count ? (int)e : -1;
  }
};
