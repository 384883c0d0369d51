// Dropout's random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11).
//
// A counter-based generator: the word of an element follows from its position alone, so that any tiling, layout or
// thread count draws the same mask, and so does the backward.

struct PhiloxRow {
  uint64_t seed;
  uint32_t query, head, batch;
};

// words[c] for the keys first_key + c of one query, c < kUnit. Element (batch, head, query, key) is word key % 4 of
// counter (key / 4, query, head, batch); first_key is a multiple of 4. The state's 32-bit words lie in the low halves
// of 64-bit lanes, one counter per lane: what the multiplication takes and gives, with no shuffles between the rounds;
// what gathers in the high halves is never read.
PYATTN_INLINE void philox_words(const PhiloxRow& row, int64_t first_key, uint32_t* words) {
  constexpr int kCounters = kVectorBytes / 8;
  const Bits64 multiplier0 = Bits64{} + 0xD2511F53, multiplier1 = Bits64{} + 0xCD9E8D57, low = Bits64{} + 0xffffffff;
  for (int counter = 0; counter < kUnit / 4; counter += kCounters) {
    Bits64 c0 = {}, c1 = Bits64{} + row.query, c2 = Bits64{} + row.head, c3 = Bits64{} + row.batch;
    for (int i = 0; i < kCounters; ++i) c0[i] = static_cast<uint64_t>(first_key / 4 + counter + i);
    uint32_t key0 = static_cast<uint32_t>(row.seed), key1 = static_cast<uint32_t>(row.seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const Bits64 product0 = multiply_low_halves(c0, multiplier0), product1 = multiply_low_halves(c2, multiplier1);
      c0 = (product1 >> 32) ^ c1 ^ (Bits64{} + key0);
      c1 = product1;
      c2 = (product0 >> 32) ^ c3 ^ (Bits64{} + key1);
      c3 = product0;
      key0 += 0x9E3779B9;
      key1 += 0xBB67AE85;
    }
    const Bits64 words01 = (c0 & low) | c1 << 32, words23 = (c2 & low) | c3 << 32;
    for (int i = 0; i < kCounters; ++i) {
      const uint64_t pairs[2] = {words01[i], words23[i]};
      memcpy(words + 4 * (counter + i), pairs, sizeof pairs);
    }
  }
}
