// Exact byte-pair encoding, faster: cut, look up, merge.
//
// Two adjacent characters that stand side by side inside no piece of the vocabulary can never be merged, so the text may
// be cut between them; what lies between cuts repeats, so most of it is answered by a cache from chunk to ids. The rest is
// merged as SentencePiece does: the adjacent pair of best rank first, the leftmost of equals.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr uint32_t kCodePoints = 0x110000;
constexpr int32_t kNoSymbol = -1;
constexpr size_t kKeyBytes = 30;
constexpr size_t kCachedIds = 8;  // an entry fills one cache line of 64 bytes

uint64_t mix(uint64_t value) {
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9ULL;
  value = (value ^ (value >> 27)) * 0x94D049BB133111EBULL;
  return value ^ (value >> 31);
}

uint64_t pair_key(uint32_t left, uint32_t right) { return (uint64_t{left} << 32) | right; }

struct Entry {
  uint8_t key_length = 0;  // 0: empty
  uint8_t num_ids = 0;
  char key[kKeyBytes];
  uint32_t ids[kCachedIds];
};

struct Merge {
  int32_t rank;
  uint32_t left;
  uint32_t right;
  int32_t merged;
  uint32_t width;  // characters of both sides when the merge was found; stale if they have changed
  bool operator<(const Merge& other) const {  // a heap gives the largest first
    return rank != other.rank ? rank > other.rank : left > other.left;
  }
};

struct Symbol {
  int32_t id;
  uint32_t width;  // characters; 0: merged into its left neighbour
  int32_t previous;
  int32_t next;
  uint32_t byte_start;
};

// Open addressing from (left symbol, right symbol) to the merged symbol.
struct MergeTable {
  std::vector<uint64_t> keys;
  std::vector<int32_t> merged;
  uint64_t mask = 0;
  static constexpr uint64_t kEmpty = ~uint64_t{0};

  void reserve(size_t count) {
    size_t size = 16;
    while (size < 3 * count) size *= 2;
    keys.assign(size, kEmpty);
    merged.assign(size, kNoSymbol);
    mask = size - 1;
  }
  void insert(uint64_t key, int32_t value) {
    uint64_t at = mix(key) & mask;
    while (keys[at] != kEmpty && keys[at] != key) at = (at + 1) & mask;
    keys[at] = key;
    merged[at] = value;
  }
  int32_t find(uint64_t key) const {
    uint64_t at = mix(key) & mask;
    while (keys[at] != kEmpty && keys[at] != key) at = (at + 1) & mask;
    return keys[at] == key ? merged[at] : kNoSymbol;
  }
};

struct Encoder {
  std::vector<int32_t> symbol_of_character = std::vector<int32_t>(kCodePoints, kNoSymbol);
  std::vector<int32_t> rank_of_symbol;
  MergeTable merges;
  std::vector<uint64_t> joined;  // hashed set of character pairs inside pieces; a false hit only means no cut
  uint64_t joined_mask;
  bool joined_ascii[128][128] = {};  // the same, exact, for the pairs that are most of the text
  std::vector<Entry> cache;
  uint64_t cache_mask;
  int32_t num_pieces;
  uint32_t byte_ids[256];
  std::vector<Symbol> symbols;
  std::vector<uint32_t> ids;
  std::vector<Merge> agenda;
};

uint64_t hash_bytes(const char* data, size_t length) {
  uint64_t hash = 0x9E3779B97F4A7C15ULL ^ length;
  for (; length >= 8; data += 8, length -= 8) {
    uint64_t word;
    std::memcpy(&word, data, 8);
    hash = mix(hash ^ word);
  }
  uint64_t word = 0;
  std::memcpy(&word, data, length);
  return mix(hash ^ word);
}

// Decodes one character of valid UTF-8 and moves `text` behind it.
inline uint32_t next_character(const unsigned char*& text) {
  uint32_t first = *text++;
  if (first < 0x80) return first;
  uint32_t value, more;
  if (first < 0xE0) {
    value = first & 0x1F, more = 1;
  } else if (first < 0xF0) {
    value = first & 0x0F, more = 2;
  } else {
    value = first & 0x07, more = 3;
  }
  while (more--) value = (value << 6) | (*text++ & 0x3F);
  return value;
}

inline bool is_joined(const Encoder& encoder, uint32_t left, uint32_t right) {
  if ((left | right) < 0x80) return encoder.joined_ascii[left][right];
  uint64_t bit = mix(pair_key(left, right)) & encoder.joined_mask;
  return (encoder.joined[bit >> 6] >> (bit & 63)) & 1;
}

void consider(Encoder& encoder, int32_t left, int32_t right) {
  if (left < 0 || right < 0) return;
  const Symbol &a = encoder.symbols[left], &b = encoder.symbols[right];
  if (a.id == kNoSymbol || b.id == kNoSymbol) return;
  int32_t merged = encoder.merges.find(pair_key(uint32_t(a.id), uint32_t(b.id)));
  if (merged == kNoSymbol) return;
  encoder.agenda.push_back({encoder.rank_of_symbol[merged], uint32_t(left), uint32_t(right), merged, a.width + b.width});
  std::push_heap(encoder.agenda.begin(), encoder.agenda.end());
}

void split_characters(Encoder& encoder, const char* chunk, size_t length) {
  auto text = reinterpret_cast<const unsigned char*>(chunk);
  const auto begin = text, end = text + length;
  encoder.symbols.clear();
  while (text < end) {
    uint32_t at = uint32_t(text - begin);
    int32_t number = int32_t(encoder.symbols.size());
    encoder.symbols.push_back({encoder.symbol_of_character[next_character(text)], 1, number - 1, number + 1, at});
  }
  encoder.symbols.back().next = -1;
}

void merge_all(Encoder& encoder) {
  auto& agenda = encoder.agenda;
  auto& symbols = encoder.symbols;
  for (size_t number = 1; number < symbols.size(); ++number) consider(encoder, int32_t(number - 1), int32_t(number));
  while (!agenda.empty()) {
    Merge best = agenda.front();
    std::pop_heap(agenda.begin(), agenda.end());
    agenda.pop_back();
    Symbol &left = symbols[best.left], &right = symbols[best.right];
    if (!left.width || !right.width || left.width + right.width != best.width) continue;
    left.id = best.merged;
    left.width += right.width;
    left.next = right.next;
    if (right.next >= 0) symbols[right.next].previous = int32_t(best.left);
    right.width = 0;
    consider(encoder, left.previous, int32_t(best.left));
    consider(encoder, int32_t(best.left), left.next);
  }
}

void encode_chunk(Encoder& encoder, const char* chunk, size_t length) {
  split_characters(encoder, chunk, length);
  merge_all(encoder);
  encoder.ids.clear();
  auto& symbols = encoder.symbols;
  for (int32_t number = 0; number >= 0; number = symbols[number].next) {
    const Symbol& symbol = symbols[number];
    if (symbol.id != kNoSymbol && symbol.id < encoder.num_pieces) {
      encoder.ids.push_back(uint32_t(symbol.id));
      continue;
    }
    size_t stop = symbol.next >= 0 ? symbols[symbol.next].byte_start : length;
    for (size_t at = symbol.byte_start; at < stop; ++at) {
      encoder.ids.push_back(encoder.byte_ids[static_cast<unsigned char>(chunk[at])]);
    }
  }
}

template <typename Id>
Id* write_chunk(Encoder& encoder, const char* chunk, size_t length, Id* out) {
  if (length > kKeyBytes) {
    encode_chunk(encoder, chunk, length);
    for (uint32_t id : encoder.ids) *out++ = Id(id);
    return out;
  }
  Entry& entry = encoder.cache[hash_bytes(chunk, length) & encoder.cache_mask];
  if (entry.key_length == length && !std::memcmp(entry.key, chunk, length)) {
    for (uint32_t number = 0; number < entry.num_ids; ++number) *out++ = Id(entry.ids[number]);
    return out;
  }
  encode_chunk(encoder, chunk, length);
  if (encoder.ids.size() <= kCachedIds) {
    entry.key_length = uint8_t(length);
    entry.num_ids = uint8_t(encoder.ids.size());
    std::memcpy(entry.key, chunk, length);
    std::copy(encoder.ids.begin(), encoder.ids.end(), entry.ids);
  }
  for (uint32_t id : encoder.ids) *out++ = Id(id);
  return out;
}

template <typename Id>
int64_t encode(Encoder& encoder, const char* data, int64_t length, Id* out) {
  auto text = reinterpret_cast<const unsigned char*>(data);
  const auto end = text + length;
  Id* const begin = out;
  auto chunk = text;
  uint32_t previous = text < end ? next_character(text) : 0;
  while (text < end) {
    const auto here = text;
    uint32_t character = next_character(text);
    if (!is_joined(encoder, previous, character)) {
      out = write_chunk(encoder, reinterpret_cast<const char*>(chunk), size_t(here - chunk), out);
      chunk = here;
    }
    previous = character;
  }
  if (chunk < end) out = write_chunk(encoder, reinterpret_cast<const char*>(chunk), size_t(end - chunk), out);
  return out - begin;
}

}  // namespace

extern "C" {

// Symbols below num_pieces are pieces; those above stand for characters that occur in pieces but are none.
void* encoder_new(int32_t num_pieces, int32_t num_symbols, const int32_t* ranks, const uint32_t* byte_ids, int32_t cache_bits,
                  int32_t joined_bits) {
  auto encoder = new Encoder;
  encoder->num_pieces = num_pieces;
  encoder->rank_of_symbol.assign(ranks, ranks + num_symbols);
  std::memcpy(encoder->byte_ids, byte_ids, sizeof encoder->byte_ids);
  encoder->cache.resize(size_t{1} << cache_bits);
  encoder->cache_mask = (uint64_t{1} << cache_bits) - 1;
  encoder->joined.resize((size_t{1} << joined_bits) / 64);
  encoder->joined_mask = (uint64_t{1} << joined_bits) - 1;
  return encoder;
}

void encoder_add(void* handle, const uint32_t* characters, const int32_t* symbols, int64_t num_characters, const uint32_t* joined,
                 int64_t num_joined, const int32_t* merges, int64_t num_merges) {
  auto& encoder = *static_cast<Encoder*>(handle);
  for (int64_t number = 0; number < num_characters; ++number) encoder.symbol_of_character[characters[number]] = symbols[number];
  for (int64_t number = 0; number < num_joined; ++number) {
    uint32_t left = joined[2 * number], right = joined[2 * number + 1];
    if ((left | right) < 0x80) encoder.joined_ascii[left][right] = true;
    uint64_t bit = mix(pair_key(left, right)) & encoder.joined_mask;
    encoder.joined[bit >> 6] |= uint64_t{1} << (bit & 63);
  }
  encoder.merges.reserve(size_t(num_merges));
  for (int64_t number = 0; number < num_merges; ++number) {
    const int32_t* merge = merges + 3 * number;
    encoder.merges.insert(pair_key(uint32_t(merge[0]), uint32_t(merge[1])), merge[2]);
  }
}

// `out` has room for one id per byte of text. Returns the number of ids.
int64_t encoder_encode_16(void* handle, const char* text, int64_t length, uint16_t* out) {
  return encode(*static_cast<Encoder*>(handle), text, length, out);
}

int64_t encoder_encode_32(void* handle, const char* text, int64_t length, uint32_t* out) {
  return encode(*static_cast<Encoder*>(handle), text, length, out);
}

void encoder_delete(void* handle) { delete static_cast<Encoder*>(handle); }
}
