// What XLA calls: the arguments of a custom call, checked against each other, and the kernels run on them in pieces.
#include <cstdlib>
#include <cstring>
#include <new>
#include <optional>
#include <string>

#include "pool.h"
#include "weight.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace kernels {

namespace {

constexpr int64_t kOutputsStep = 16;          // pieces are multiples of so many outputs
constexpr int64_t kPieceBytes = 32 << 10;     // of weights, for few rows
constexpr int64_t kAloneBytes = 24 << 10;     // so small a product is not worth another thread
constexpr int64_t kAloneScores = 96 << 10;    // elements of keys, times queries
constexpr int64_t kItemsAThread = 4;          // blocks of attention that keep a thread busy until the others are done
constexpr int64_t kMostTokens = 8192;         // of one call of attention
constexpr int kMostWeights = 8;

ffi::Error wrong(const std::string& what) { return ffi::Error(ffi::ErrorCode::kInvalidArgument, "mesh kernels: " + what); }

// Memory of the calling thread, kept from call to call. A thread makes one call at a time.
float* scratch(int which, int64_t floats) {
  struct Kept {
    float* data[2] = {};
    int64_t size[2] = {};
    ~Kept() { std::free(data[0]), std::free(data[1]); }
  };
  static thread_local Kept kept;
  if (floats > kept.size[which]) {
    std::free(kept.data[which]);
    void* p = nullptr;
    if (posix_memalign(&p, 64, (size_t)floats * sizeof(float))) p = nullptr;
    kept.data[which] = (float*)p;
    kept.size[which] = p ? floats : 0;
  }
  return kept.data[which];
}

// The arguments one after the other. `ok` is false once one was missing or not as it must be.
struct Arguments {
  ffi::RemainingArgs args;
  size_t at = 0;
  bool ok = true;
  std::string problem;

  const void* next(int64_t count, ffi::DataType type, const char* what) {
    auto buffer = args.get<ffi::AnyBuffer>(at++);
    if (!buffer.has_value()) return miss(std::string(what) + " is missing");
    if (buffer->element_type() != type || (count >= 0 && (int64_t)buffer->element_count() != count))
      return miss(std::string(what) + " has " + std::to_string(buffer->element_count()) + " elements where " + std::to_string(count) +
                  " are needed, or another type");
    return buffer->untyped_data();
  }
  const float* floats(int64_t count, const char* what) { return (const float*)next(count, ffi::DataType::F32, what); }
  const int32_t* integers(int64_t count, const char* what) { return (const int32_t*)next(count, ffi::DataType::S32, what); }
  const void* any(int64_t count, Kind* kind, int64_t* found, const char* what) {
    auto buffer = args.get<ffi::AnyBuffer>(at++);
    if (!buffer.has_value()) return miss(std::string(what) + " is missing");
    *found = (int64_t)buffer->element_count();
    switch (buffer->element_type()) {
      case ffi::DataType::F32: *kind = kFloat32; break;
      case ffi::DataType::F16: *kind = kFloat16; break;
      case ffi::DataType::BF16: *kind = kBfloat16; break;
      case ffi::DataType::S8: *kind = kInt8; break;
      case ffi::DataType::U8: *kind = kUint8; break;
      default: return miss(std::string(what) + " has a type that no kernel reads");
    }
    if (count >= 0 && *found != count) return miss(std::string(what) + " has " + std::to_string(*found) + " elements where " + std::to_string(count) + " are needed");
    return buffer->untyped_data();
  }
  std::nullptr_t miss(std::string why) {
    if (ok) problem = std::move(why);
    ok = false;
    return nullptr;
  }
};

// Whether the input of this weight is read as whole numbers.
bool reads_whole(const Weight& w) { return best().reads_whole && best().reads_whole(w); }

// Whether a rounded input of this weight is read in bfloat16.
bool reads_rounded(const Weight& w) { return best().reads_rounded && best().reads_rounded(w); }

// How one weight is described: see mesh/kernels/calls.py.
enum Field { kKindField, kOutField, kInField, kGroupField, kOffsetField, kScaleField, kZeroField, kMinimumField, kBiasField, kFields };

Numbers numbers(Arguments& args, int64_t parts, int64_t count, const char* what) {
  Numbers n;
  if (!parts) return n;
  int64_t found = 0;
  n.data = args.any(count, &n.kind, &found, what);
  if (parts > 1) {
    n.step = args.any(-1, &n.step_kind, &found, what);
    if (!found || count % found) args.miss(std::string(what) + " has a step for a part of a number");
    else n.each = count / found;
  }
  return n;
}

// Elements of the codes of `count` weights: bytes, if they are packed.
int64_t codes_of(Kind kind, int64_t count) { return kind >= kNibbles && kind != kByteTiles ? count / 2 : count; }

Weight weight(Arguments& args, const int64_t* field) {
  Weight w;
  w.kind = (Kind)field[kKindField], w.out = field[kOutField], w.in = field[kInField];
  w.group = field[kGroupField], w.offset = (float)field[kOffsetField];
  const bool packed = w.kind >= kNibbles, six = w.kind == kSixBits || w.kind == kSixBitTiles;
  if (w.kind < kFloat32 || w.kind > kByteTiles || w.out < 1 || w.in < 1 || w.group < 0) args.miss("a weight is described wrongly");
  if (packed && w.in % (six ? 64 : 32)) args.miss("a weight of packed codes is not made of whole blocks");
  if (w.group && w.group < w.in && (w.group & (w.group - 1) || w.group < 16)) args.miss("a group is no power of two from 16 on");
  if (!args.ok) return w;
  Kind kind = w.kind;
  int64_t found = 0;
  const int64_t count = w.out * w.in;
  w.codes = args.any(codes_of(w.kind, count), &kind, &found, "a weight");
  if (kind != (packed ? kUint8 : w.kind)) args.miss("a weight's codes have another type than was said");
  if (w.kind == kFiveBits) w.high = (const uint8_t*)args.next(count / 8, ffi::DataType::U8, "the upper bits of a weight");
  if (six) w.high = (const uint8_t*)args.next(count / 4, ffi::DataType::U8, "the upper bits of a weight");
  const int64_t factors = w.out * w.groups();
  w.scale = numbers(args, field[kScaleField], factors, "a scale");
  w.zero = numbers(args, field[kZeroField], factors, "a zero point");
  w.minimum = numbers(args, field[kMinimumField], factors, "a minimum");
  if (field[kBiasField]) w.bias = args.floats(w.out, "a bias");
  if (w.kind >= kTiles && (w.out % 16 || !reads_whole(w))) args.miss("these kernels read no tiles, or not of this weight");
  const bool floating = w.kind <= kBfloat16;
  if (floating == (w.scale.data != nullptr) || (floating && (w.zero.data || w.minimum.data))) args.miss("a weight has factors that its kind has not");
  return w;
}

int64_t bytes_of(const Weight& w) {
  static const int bits[] = {32, 16, 16, 8, 8, 4, 5, 6, 4, 6, 8};
  return w.out * w.in * bits[w.kind] / 8;
}

// A row of an input, with zeros after its end.
void copy_row(const float* from, int64_t in, float* to, int64_t stride) {
  std::memcpy(to, from, (size_t)in * sizeof(float));
  std::memset(to + in, 0, (size_t)(stride - in) * sizeof(float));
}

// The outputs of a piece of about `piece_bytes` of a weight. `few`: no more than what many rows are multiplied with at a time.
int64_t outputs_of(int64_t out, int64_t bytes, int64_t piece_bytes, bool few) {
  const int64_t outputs = (out * piece_bytes / bytes + kOutputsStep - 1) / kOutputsStep * kOutputsStep;
  if (few && outputs > 64) return 64;
  return outputs < kOutputsStep ? kOutputsStep : outputs;
}

// Whole numbers of `rows` rows, in floats of scratch memory.
int64_t whole_size(int64_t rows, int64_t in) { return rows * (in / 32) * (int64_t)(sizeof(Whole) / sizeof(float)); }

// An input in bfloat16, in floats of scratch memory.
int64_t rounded_size(int64_t rows, int64_t in) { return (rows + 15) / 16 * 16 * ((in + 31) / 32 * 16); }

enum Prologue : int64_t { kAsGiven, kRmsNorm, kGatedSilu, kGatedGelu };

struct Products {
  Weight weights[kMostWeights];
  float* results[kMostWeights];
  int64_t firsts[kMostWeights + 1];  // the first piece of each weight
  int64_t outputs[kMostWeights];     // of each of its pieces
  int count;
  Prologue prologue;
  const float *x, *second, *residual;
  float epsilon;
  int64_t rows, in, stride;
  float* prepared;  // nullptr: the input is read as it is given
  Whole* whole;     // nullptr: no weight reads it so
  bool rounds;         // the input, to bfloat16
  uint16_t* rounded;   // nullptr: no weight reads it so

  static constexpr int64_t kRowsAPiece = 4;

  const float* input() const { return prepared ? prepared : x; }

  void prepare(int64_t piece) const {
    const int64_t first = piece * kRowsAPiece, some = rows - first < kRowsAPiece ? rows - first : kRowsAPiece;
    if (prepared) copy(first, some);
    if (rounds) best().round(prepared + first * stride, some * stride);
    for (int64_t r = first; r < first + some; r++) {
      if (whole) best().to_whole(input() + r * stride, in, whole + r * (in / 32));
      if (rounded) best().to_rounded(input() + r * stride, in, r, rounded);
    }
  }

  void copy(int64_t first, int64_t some) const {
    const float *from = x + first * in, *up = second + first * in;
    float* to = prepared + first * stride;
    if (prologue == kRmsNorm) return best().rms_norm(from, second, epsilon, some, in, stride, to);
    if (prologue == kGatedSilu) return best().gated(kSilu, from, up, some, in, stride, to);
    if (prologue == kGatedGelu) return best().gated(kGeluTanh, from, up, some, in, stride, to);
    for (int64_t r = 0; r < some; r++) copy_row(from + r * in, in, to + r * stride, stride);
  }

  void multiply(int64_t piece) const {
    int i = 0;
    while (piece >= firsts[i + 1]) i++;
    const Weight& w = weights[i];
    const int64_t first = (piece - firsts[i]) * outputs[i];
    const int64_t last = first + outputs[i] < w.out ? first + outputs[i] : w.out;
    best().tile(Tile{&w, first, last, input(), rows, stride, results[i], residual, reads_whole(w) ? whole : nullptr,
                     reads_rounded(w) ? rounded : nullptr});
  }
};

ffi::Error products(ffi::ThreadPool threads, ffi::RemainingArgs given, ffi::RemainingRets results, ffi::Span<const int64_t> described,
                    int64_t rows, int64_t prologue, float epsilon, int64_t rounds, int64_t residual, int64_t counted) {
  Products call;
  call.count = (int)(described.size() / kFields);
  if (call.count < 1 || call.count > kMostWeights || described.size() % kFields || results.size() != (size_t)call.count || rows < 1)
    return wrong("a call of products is described wrongly");
  Arguments args{given, 0, true, ""};
  call.prologue = (Prologue)prologue, call.epsilon = epsilon, call.rows = rows;
  call.in = described[kInField], call.stride = (call.in + 15) / 16 * 16;
  call.x = args.floats(rows * call.in, "the input");
  call.second = nullptr;
  if (prologue == kRmsNorm) call.second = args.floats(call.in, "the norm's scale");
  if (prologue == kGatedSilu || prologue == kGatedGelu) call.second = args.floats(rows * call.in, "the gated input");
  int64_t size = 0;
  for (int i = 0; i < call.count && args.ok; i++) {
    const Weight w = call.weights[i] = weight(args, described.begin() + i * kFields);
    if (w.in != call.in) return wrong("the weights of one input differ in its size");
    auto result = results.get<ffi::AnyBuffer>(i);
    if (!result.has_value() || (*result)->element_type() != ffi::DataType::F32 || (int64_t)(*result)->element_count() != rows * w.out)
      return wrong("a result has another size than its product");
    call.results[i] = (float*)(*result)->untyped_data();
    size += bytes_of(w);
  }
  call.residual = residual && args.ok ? args.floats(rows * call.weights[0].out, "the residual") : nullptr;
  const int32_t* real = counted ? args.integers(1, "the number of rows") : nullptr;
  if (!args.ok) return wrong(args.problem);
  if (residual && call.count > 1) return wrong("a residual is added to one product");
  if (real && (*real < 0 || *real > rows)) return wrong("more rows are to be computed than there are");
  if (real) rows = call.rows = *real;
  if (!rows) return ffi::Error::Success();

  bool whole = false, rounded = false;
  for (int i = 0; i < call.count; i++) whole |= reads_whole(call.weights[i]), rounded |= rounds && reads_rounded(call.weights[i]);
  const bool copies = prologue != kAsGiven || call.stride != call.in || rounds, prepares = copies || whole;
  const int64_t copied = copies ? rows * call.stride : 0, halved = rounded ? rounded_size(rows, call.in) : 0;
  float* memory = prepares ? scratch(0, copied + halved + (whole ? whole_size(rows, call.in) : 0)) : nullptr;
  call.prepared = copies ? memory : nullptr;
  call.rounds = rounds, call.rounded = rounded ? (uint16_t*)(memory + copied) : nullptr;
  call.whole = whole ? (Whole*)(memory + copied + halved) : nullptr;
  if (prepares && !memory) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "mesh kernels: no memory for the input of a product");
  const int64_t most = 8 * (threads.num_threads() + 1);
  const bool alone = size * (rows < 4 ? 1 : rows) < kAloneBytes;
  const int64_t piece_bytes = alone ? size + 1 : size / most > kPieceBytes ? size / most : kPieceBytes;
  call.firsts[0] = 0;
  for (int i = 0; i < call.count; i++) {
    const Weight& w = call.weights[i];
    call.outputs[i] = outputs_of(w.out, bytes_of(w), piece_bytes, rows > 8 && !alone);
    call.firsts[i + 1] = call.firsts[i] + (w.out + call.outputs[i] - 1) / call.outputs[i];
  }
  Plan* plan = new (std::nothrow) Plan(&call);
  if (!plan) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "mesh kernels: no memory");
  const int64_t rows_pieces = (rows + Products::kRowsAPiece - 1) / Products::kRowsAPiece;
  plan->add(prepares ? rows_pieces : 0, [](void* c, int64_t piece) { ((Products*)c)->prepare(piece); });
  plan->add(call.firsts[call.count], [](void* c, int64_t piece) { ((Products*)c)->multiply(piece); });
  run(plan, threads);
  return ffi::Error::Success();
}

// The numbers from `first` on.
Numbers after(Numbers n, int64_t first) {
  static const int bytes[] = {4, 2, 2, 1, 1};
  if (n.data) n.data = (const char*)n.data + first * bytes[n.kind];
  if (n.step) n.step = (const char*)n.step + first / n.each * bytes[n.step_kind];
  return n;
}

// The outputs first .. first + count - 1 of a weight.
Weight part(const Weight& w, int64_t first, int64_t count) {
  Weight p = w;
  p.out = count;
  p.codes = (const char*)w.codes + (w.kind >= kNibbles ? codes_of(w.kind, first * w.in) : bytes_of(w) / w.out * first);
  if (w.high) p.high = w.high + first * w.in / (w.kind == kFiveBits ? 8 : 4);
  const int64_t groups = w.groups();
  p.scale = after(w.scale, first * groups), p.zero = after(w.zero, first * groups), p.minimum = after(w.minimum, first * groups);
  return p;
}

// Each row times the weight of the expert that it has chosen. Rows of one expert are multiplied together, whatever their order.
struct ExpertProducts {
  struct Group {
    int32_t expert, first, count;  // rows first .. first + count - 1 of those in the order of their experts
    int32_t place;                 // of the first one in `rounded`
  };
  Weight weight;  // of all experts, one after the other: [experts * out, in]
  const float* x;
  const int32_t* chosen;
  float* result;
  int64_t experts, out, rows, in, stride, outputs, pieces;  // outputs: of a piece; pieces: of an expert
  int32_t *order, *starts;                                  // [rows], [experts + 1]
  int32_t* places;                                          // [rows]: where `rounded` has each of `sorted`
  Group* groups;
  int64_t used;
  Whole* whole;               // of `sorted`, or nullptr
  bool rounds;
  uint16_t* rounded;         // of `sorted`, each group in panels of its own, or nullptr
  float *sorted, *products;  // [rows, stride], [rows, out]: in the order of their experts

  static constexpr int64_t kRowsAPiece = 4;

  bool sort() {
    std::memset(starts, 0, (size_t)(experts + 1) * sizeof(int32_t));
    for (int64_t r = 0; r < rows; r++) {
      if (chosen[r] < 0 || chosen[r] >= experts) return false;
      starts[chosen[r] + 1]++;
    }
    used = 0;
    int32_t place = 0;
    for (int64_t e = 0; e < experts; e++) {
      const int32_t count = starts[e + 1];
      for (int32_t i = 0; i < count; i++) places[starts[e] + i] = place + i;
      if (count) groups[used++] = {(int32_t)e, starts[e], count, place}, place += (count + 15) / 16 * 16;
      starts[e + 1] += starts[e];
    }
    for (int64_t r = 0; r < rows; r++) order[starts[chosen[r]]++] = (int32_t)r;
    return true;
  }

  template <typename Do>
  void rows_of(int64_t piece, Do each) const {
    for (int64_t at = piece * kRowsAPiece; at < rows && at < (piece + 1) * kRowsAPiece; at++) each(at, order[at]);
  }

  void bring(int64_t piece) const {
    rows_of(piece, [&](int64_t at, int64_t row) {
      copy_row(x + row * in, in, sorted + at * stride, stride);
      if (rounds) best().round(sorted + at * stride, stride);
      if (whole) best().to_whole(sorted + at * stride, in, whole + at * (in / 32));
      if (rounded) best().to_rounded(sorted + at * stride, in, places[at], rounded);
    });
  }

  void multiply(int64_t piece) const {
    const Group& g = groups[piece / pieces];
    const int64_t first = piece % pieces * outputs, last = first + outputs < out ? first + outputs : out;
    const Weight w = part(weight, g.expert * out, out);
    const Whole* numbers = whole ? whole + g.first * (in / 32) : nullptr;
    best().tile(Tile{&w, first, last, sorted + g.first * stride, g.count, stride, products + g.first * out, nullptr, numbers,
                     rounded ? rounded + g.place * in : nullptr});
  }

  void put(int64_t piece) const {
    rows_of(piece, [&](int64_t at, int64_t row) { std::memcpy(result + row * out, products + at * out, (size_t)out * sizeof(float)); });
  }
};

ffi::Error expert_products(ffi::ThreadPool threads, ffi::RemainingArgs given, ffi::Result<ffi::AnyBuffer> result,
                           ffi::Span<const int64_t> described, int64_t rows, int64_t experts, int64_t rounds) {
  if (described.size() != kFields || rows < 1 || rows > INT32_MAX || experts < 1 || experts > INT32_MAX || described[kOutField] % experts ||
      (described[kKindField] >= kTiles && described[kOutField] / experts % 16) ||
      described[kBiasField])
    return wrong("a call of experts is described wrongly");
  ExpertProducts call{};
  Arguments args{given, 0, true, ""};
  call.rows = rows, call.experts = experts, call.in = described[kInField], call.stride = (call.in + 15) / 16 * 16;
  call.x = args.floats(rows * call.in, "the input");
  call.chosen = args.integers(rows, "the experts that are chosen");
  if (args.ok) call.weight = weight(args, described.begin());
  if (!args.ok) return wrong(args.problem);
  call.out = call.weight.out / experts;
  if (result->element_type() != ffi::DataType::F32 || (int64_t)result->element_count() != rows * call.out)
    return wrong("a result has another size than its product");
  call.result = (float*)result->untyped_data();
  const int64_t most_used = rows < experts ? rows : experts;
  const int64_t integers = 2 * rows + experts + 1 + 4 * most_used;
  const int64_t whole = reads_whole(call.weight) ? whole_size(rows, call.in) : 0;
  const int64_t rounded = rounds && reads_rounded(call.weight) ? rounded_size(rows + 15 * most_used, call.in) : 0;
  float* memory = scratch(0, rows * (call.stride + call.out) + integers + whole + rounded);
  if (!memory) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "mesh kernels: no memory for the products of experts");
  call.sorted = memory, call.products = memory + rows * call.stride;
  call.order = (int32_t*)(call.products + rows * call.out), call.places = call.order + rows, call.starts = call.places + rows;
  call.groups = (ExpertProducts::Group*)(call.starts + experts + 1);
  float* after = memory + rows * (call.stride + call.out) + integers;
  if (whole) call.whole = (Whole*)after;
  if (rounded) call.rounded = (uint16_t*)(after + whole);
  call.rounds = rounds;
  if (!call.sort()) return wrong("an expert is chosen that there is not");

  const int64_t size = bytes_of(call.weight) / experts, most = 8 * (threads.num_threads() + 1);
  const int64_t piece_bytes = size * call.used / most > kPieceBytes ? size * call.used / most : kPieceBytes;
  call.outputs = outputs_of(call.out, size, piece_bytes, rows > 8 * call.used);
  call.pieces = (call.out + call.outputs - 1) / call.outputs;
  Plan* plan = new (std::nothrow) Plan(&call);
  if (!plan) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "mesh kernels: no memory");
  const int64_t rows_pieces = (rows + ExpertProducts::kRowsAPiece - 1) / ExpertProducts::kRowsAPiece;
  plan->add(rows_pieces, [](void* c, int64_t piece) { ((ExpertProducts*)c)->bring(piece); });
  plan->add(call.used * call.pieces, [](void* c, int64_t piece) { ((ExpertProducts*)c)->multiply(piece); });
  plan->add(rows_pieces, [](void* c, int64_t piece) { ((ExpertProducts*)c)->put(piece); });
  run(plan, threads);
  return ffi::Error::Success();
}

ffi::Error attention(ffi::ThreadPool threads, ffi::RemainingArgs given, ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> keys_out,
                     ffi::Result<ffi::AnyBuffer> values_out, int64_t tokens, int64_t heads, int64_t rotated_pairs, int64_t interleaved,
                     int64_t length, int64_t window, float scale, float softcap) {
  Attention a{};
  const auto cache = keys_out->dimensions();
  const ffi::DataType type = keys_out->element_type();
  const bool floats = type == ffi::DataType::F32, codes = type == ffi::DataType::S8;
  if (cache.size() != 4 || (!floats && !codes && type != ffi::DataType::F16) || values_out->element_type() != type ||
      keys_out->element_count() != values_out->element_count())
    return wrong("a cache is float32, float16 or int8 [rows, heads, positions, size], keys like values");
  a.cache = floats ? kFloat32 : codes ? kInt8 : kFloat16;
  a.cache_rows = cache[0], a.kv_heads = cache[1], a.slots = cache[2], a.dim = cache[3] - (codes ? (int64_t)sizeof(float) : 0);
  a.heads = heads, a.half = rotated_pairs, a.interleaved = interleaved != 0;
  a.length = length, a.window = window, a.scale = scale, a.softcap = softcap;
  if (tokens < 1 || tokens > kMostTokens || a.kv_heads < 1 || heads < a.kv_heads || heads % a.kv_heads || a.dim < 1 ||
      length < 1 || length > a.slots || 2 * rotated_pairs > a.dim || out->element_type() != ffi::DataType::F32 ||
      (int64_t)out->element_count() != tokens * heads * a.dim)
    return wrong("a call of attention is described wrongly");
  Arguments args{given, 0, true, ""};
  a.q = args.floats(tokens * heads * a.dim, "the queries");
  a.k = args.floats(tokens * a.kv_heads * a.dim, "the keys");
  a.v = args.floats(tokens * a.kv_heads * a.dim, "the values");
  if (rotated_pairs) {
    a.cos = args.floats(tokens * rotated_pairs, "the cosines");
    a.sin = args.floats(tokens * rotated_pairs, "the sines");
  }
  a.positions = args.integers(tokens, "the positions");
  a.writes = args.integers(tokens, "the positions to write to");
  a.rows = args.integers(tokens, "the rows");
  const int32_t* real = args.integers(1, "the number of tokens");
  const void* keys = args.next((int64_t)keys_out->element_count(), type, "the cache of keys");
  const void* values = args.next((int64_t)values_out->element_count(), type, "the cache of values");
  if (!args.ok) return wrong(args.problem);
  a.keys = keys_out->untyped_data(), a.values = values_out->untyped_data(), a.out = (float*)out->untyped_data();
  if (keys != a.keys) std::memcpy(a.keys, keys, keys_out->size_bytes());
  if (values != a.values) std::memcpy(a.values, values, values_out->size_bytes());
  if (*real < 0 || *real > tokens) return wrong("more tokens are to be computed than there are");
  a.tokens = *real;
  if (!a.tokens) return ffi::Error::Success();
  int64_t work = 0, last = 0;
  for (int64_t t = 0; t < a.tokens; t++) {
    if (a.rows[t] < 0 || a.rows[t] >= a.cache_rows) return wrong("the rows are not all in the cache");
    if (a.positions[t] < 0 || a.writes[t] < 0 || a.writes[t] >= a.slots) return wrong("a position is outside the cache");
    work += (a.positions[t] + 1) * heads * a.dim;
    if (a.positions[t] > last) last = a.positions[t];
  }
  a.spans = ((last < length ? last + 1 : length) + kSpan - 1) / kSpan;
  static thread_local int32_t blocks[kMostTokens + 1];
  a.block_count = attention_blocks(a, blocks);
  a.blocks = blocks;

  // Enough blocks keep every thread busy, and each piece has a block's sums for itself. Few blocks are cut into their spans as well.
  const int64_t items = a.block_count * a.kv_heads, alone = work < kAloneScores;
  const bool whole = alone || items >= kItemsAThread * (threads.num_threads() + 1);
  const int64_t queries = a.tokens * heads * a.dim;
  float* memory = scratch(1, queries + (whole ? 0 : attention_partials(a, a.tokens, heads)));
  if (!memory) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "mesh kernels: no memory for attention");
  a.queries = memory, a.partials = whole ? nullptr : memory + queries;
  if (alone) {
    for (int64_t i = 0; i < a.tokens * a.kv_heads; i++) best().attention_write(a, i);
    for (int64_t i = 0; i < items; i++) best().attention_whole(a, i);
    return ffi::Error::Success();
  }
  Plan* plan = new (std::nothrow) Plan(&a);
  if (!plan) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "mesh kernels: no memory");
  plan->add(a.tokens * a.kv_heads, [](void* c, int64_t piece) { best().attention_write(*(Attention*)c, piece); });
  if (whole) {
    plan->add(items, [](void* c, int64_t piece) { best().attention_whole(*(Attention*)c, piece); });
  } else {
    plan->add(items * a.spans, [](void* c, int64_t piece) {
      const Attention& a = *(Attention*)c;
      best().attention_span(a, piece / a.spans, piece % a.spans);
    });
    plan->add(items, [](void* c, int64_t piece) { best().attention_merge(*(Attention*)c, piece); });
  }
  run(plan, threads);
  return ffi::Error::Success();
}

struct Likeliest {
  const float* logits;
  const uint32_t* allowed;
  int32_t* tokens;
  int64_t vocabulary, words;

  void row(int64_t at) const { tokens[at] = best().likeliest(logits + at * vocabulary, vocabulary, allowed + at * words); }
};

ffi::Error likeliest(ffi::ThreadPool threads, ffi::RemainingArgs given, ffi::Result<ffi::AnyBuffer> tokens, int64_t rows, int64_t vocabulary) {
  if (rows < 1 || vocabulary < 1 || vocabulary > INT32_MAX || tokens->element_type() != ffi::DataType::S32 ||
      (int64_t)tokens->element_count() != rows)
    return wrong("a call for the likeliest tokens is described wrongly");
  Likeliest call{};
  Arguments args{given, 0, true, ""};
  call.vocabulary = vocabulary, call.words = (vocabulary + 31) / 32, call.tokens = (int32_t*)tokens->untyped_data();
  call.logits = args.floats(rows * vocabulary, "the logits");
  call.allowed = (const uint32_t*)args.integers(rows * call.words, "the masks");
  if (!args.ok) return wrong(args.problem);
  Plan* plan = new (std::nothrow) Plan(&call);
  if (!plan) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "mesh kernels: no memory");
  plan->add(rows, [](void* c, int64_t row) { ((Likeliest*)c)->row(row); });
  run(plan, threads);
  return ffi::Error::Success();
}

}  // namespace

}  // namespace kernels

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(mesh_products, kernels::products,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<ffi::Span<const int64_t>>("weights")
                                  .Attr<int64_t>("rows")
                                  .Attr<int64_t>("prologue")
                                  .Attr<float>("epsilon")
                                  .Attr<int64_t>("rounds")
                                  .Attr<int64_t>("residual")
                                  .Attr<int64_t>("counted"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(mesh_expert_products, kernels::expert_products,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<ffi::Span<const int64_t>>("weights")
                                  .Attr<int64_t>("rows")
                                  .Attr<int64_t>("experts")
                                  .Attr<int64_t>("rounds"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(mesh_attention, kernels::attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("tokens")
                                  .Attr<int64_t>("heads")
                                  .Attr<int64_t>("rotated_pairs")
                                  .Attr<int64_t>("interleaved")
                                  .Attr<int64_t>("length")
                                  .Attr<int64_t>("window")
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(mesh_likeliest, kernels::likeliest,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("rows")
                                  .Attr<int64_t>("vocabulary"));

// Of the calls in mesh/kernels/calls.py: changes with what they are given.
extern "C" int mesh_kernels_version() { return 8; }

extern "C" const char* mesh_kernels_name() { return kernels::best().name; }

#pragma GCC visibility pop
