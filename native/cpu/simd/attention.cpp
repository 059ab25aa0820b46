// Attention of new tokens over paged K/V: work is cut into units, units are shared out to threads, and where the keys
// of one tile of queries were split over several units, their results are merged.
#include <omp.h>

#include "dots.hpp"
#include "panels.hpp"
#include "tiles.hpp"

namespace pagemgr::PAGEMGR_VARIANT {
namespace {

constexpr int64_t kManyRows = 96;        // rows of a unit, where a sequence has as many
constexpr int64_t kManyTileRows = 256;   // where matrix tiles multiply them, and packing K and V costs relatively more
constexpr int64_t kFloatsTogether = 4096;  // queries and sums of heads that take turns, which the first cache holds
constexpr int64_t kShortestSplit = 256;  // keys
constexpr int64_t kUnitsPerThread = 4;
constexpr int64_t kTileFloats = 6 * kTile;  // offsets of two tiles, scales of one
constexpr int64_t kLeastWork = 1 << 16;  // multiplications that are worth waking a thread

// What depends on the arguments passed by value alone: the shapes of units, and of the workspace.
struct Shape {
    int64_t threads, width, group, tokens_per_unit, rows, most_heads, row_floats, thread_floats;

    explicit Shape(const pagemgr_attention_args &args) {
        const int64_t longest = larger<int64_t>(1, args.max_query_len), heads = args.kv.num_kv_heads;
        group = group_size(args);
        threads = args.run.num_threads;
        width = ceil_div(args.kv.head_dim, kStep) * kStep;
        most_heads = threads == 1 ? heads : larger<int64_t>(1, args.num_seqs * heads / (kUnitsPerThread * threads));
        const bool in_tiles = kBfloatTiles && args.kv.dtype == PAGEMGR_BFLOAT16 && !args.kv.kv_dtype;
        const int64_t many = in_tiles ? kManyTileRows : kManyRows;
        const bool few = longest * group <= kFewRows;
        tokens_per_unit = few ? longest : smaller(longest, larger<int64_t>(1, many / group));
        rows = few ? longest * group : kRowsTogether * ceil_div(tokens_per_unit * group, kRowsTogether);
        rows = larger(rows, kFloatsTogether / (2 * width));
        row_floats = 16 * ceil_div(width + 2, 16);  // of a partial result
        const int64_t panels = few ? 0 : 2 * kTile * width;
        thread_floats = 16 * ceil_div(rows * (2 * width + 2 + kTile) + panels, 16) + kTileFloats;
    }

    // K/V heads of a unit, where a sequence has so many new tokens.
    int64_t heads_of(int64_t tokens) const {
        if (tokens * group > kFewRows) return 1;
        return larger<int64_t>(1, smaller(most_heads, kFloatsTogether / (2 * width * tokens * group)));
    }

    // Of the units that share a tile of queries there are at most twice as many as of all units were aimed at.
    int64_t most_partials() const { return threads == 1 ? 0 : 2 * kUnitsPerThread * threads; }
};

// How one sequence is cut: `tiles` of query tokens, in `parts` of `heads` K/V heads, in `splits` of keys.
struct Cut {
    int64_t tiles, heads, parts, splits;
    int64_t first_unit, first_partial;  // of this sequence
};

int64_t align(int64_t bytes) { return 64 * ceil_div(bytes, 64); }

// T is the type of queries and outputs, K that of what the pool holds.
template <class T, class K>
class Attention {
public:
    explicit Attention(const pagemgr_attention_args &args)
        : args_(args),
          shape_(args),
          cuts_(static_cast<Cut *>(args.workspace)),
          scratch_(reinterpret_cast<float *>(static_cast<char *>(args.workspace) +
                                             align((args.num_seqs + 1) * static_cast<int64_t>(sizeof(Cut))))),
          partials_(scratch_ + shape_.threads * shape_.thread_floats) {}

    void run() {
        const int64_t work = plan();
        const int64_t units = cuts_[args_.num_seqs].first_unit;
        const bool merging = cuts_[args_.num_seqs].first_partial > 0;
        const int threads = static_cast<int>(smaller(shape_.threads, 1 + work / kLeastWork));
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            float *scratch = scratch_ + omp_get_thread_num() * shape_.thread_floats;
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < units; i++) attend(i, scratch);
            if (merging) {
#pragma omp for schedule(dynamic, 1)
                for (int64_t i = 0; i < units; i++) merge_splits(i, scratch);
            }
        }
        pad();
    }

private:
    // Keys [first, stop) that queries at `position` and after see.
    void visible(int64_t seq, int64_t position, int64_t tokens, int64_t &first, int64_t &stop) const {
        const int64_t length = length_of(seq);
        first = args_.window ? larger<int64_t>(0, position - args_.window + 1) : 0;
        stop = args_.causal ? smaller(length, position + tokens) : length;
        stop = larger(first, stop);
    }

    int64_t length_of(int64_t seq) const {
        return larger<int64_t>(0, smaller<int64_t>(args_.seq_lens[seq], args_.max_seq_len));
    }

    // Fills cuts_; returns multiplications, in all.
    int64_t plan() {
        int64_t total = 0, products = 0;  // keys of all units, and pairs of keys and heads
        for (int64_t seq = 0; seq < args_.num_seqs; seq++) {
            Cut &cut = cuts_[seq];
            const int64_t tokens = args_.query_start[seq + 1] - args_.query_start[seq];
            if (length_of(seq) != args_.seq_lens[seq]) report(args_.run, PAGEMGR_BAD_LENGTH);
            cut.tiles = ceil_div(tokens, shape_.tokens_per_unit);
            cut.heads = shape_.heads_of(larger<int64_t>(1, tokens));
            cut.parts = ceil_div(args_.kv.num_kv_heads, cut.heads);
            const int64_t keys = cut.tiles * keys_of_a_tile(seq, tokens);
            total += keys * cut.parts, products += keys * args_.num_q_heads;
        }
        const int64_t goal = larger(kShortestSplit, ceil_div(total, kUnitsPerThread * shape_.threads));
        int64_t unit = 0, partial = 0;
        for (int64_t seq = 0; seq < args_.num_seqs; seq++) {
            Cut &cut = cuts_[seq];
            const int64_t tokens = args_.query_start[seq + 1] - args_.query_start[seq];
            const int64_t units = cut.tiles * cut.parts;
            cut.splits = shape_.threads == 1 ? 1 : larger<int64_t>(1, ceil_div(keys_of_a_tile(seq, tokens), goal));
            cut.first_unit = unit, cut.first_partial = partial;
            unit += units * cut.splits;
            partial += cut.splits > 1 ? units * cut.splits : 0;
        }
        cuts_[args_.num_seqs] = Cut{0, 1, 1, 1, unit, partial};
        return products * args_.kv.head_dim;
    }

    int64_t keys_of_a_tile(int64_t seq, int64_t tokens) const {
        int64_t first, stop;
        const int64_t last = smaller(tokens, shape_.tokens_per_unit);
        visible(seq, length_of(seq) - last, last, first, stop);
        return stop - first;
    }

    // The i-th unit; `split` is its number among those that share its queries.
    Unit find(int64_t i, int64_t &split) const {
        int64_t seq = 0, after = args_.num_seqs;  // the last sequence whose first unit is not past i
        while (after - seq > 1) {
            const int64_t middle = (seq + after) / 2;
            (cuts_[middle].first_unit <= i ? seq : after) = middle;
        }
        const Cut &cut = cuts_[seq];
        const int64_t local = i - cut.first_unit;
        split = local % cut.splits;
        const int64_t tile = cut.tiles - 1 - local / cut.splits / cut.parts;  // the longest first
        const int64_t start = args_.query_start[seq], tokens = args_.query_start[seq + 1] - start;
        Unit unit{};
        unit.seq = seq;
        unit.kv_head = local / cut.splits % cut.parts * cut.heads;
        unit.num_heads = smaller(cut.heads, args_.kv.num_kv_heads - unit.kv_head);
        unit.first_token = start + tile * shape_.tokens_per_unit;
        unit.num_tokens = smaller(shape_.tokens_per_unit, start + tokens - unit.first_token);
        unit.position = length_of(seq) - tokens + tile * shape_.tokens_per_unit;
        int64_t first, stop;
        visible(seq, unit.position, unit.num_tokens, first, stop);
        unit.first_key = first + (stop - first) * split / cut.splits;
        unit.stop_key = first + (stop - first) * (split + 1) / cut.splits;
        return unit;
    }

    Rows rows_in(float *scratch, const Unit &unit) const {
        const int64_t count = unit.num_heads * unit.num_tokens * shape_.group, width = shape_.width, most = shape_.rows;
        float *scores = scratch + kTileFloats, *query = scores + most * kTile, *value = query + most * width;
        float *largest = value + most * width;
        float *scales = kQuantised<K> ? scratch + 4 * kTile : nullptr;
        return Rows{count, width, query, largest, largest + most, value, scores, scales};
    }

    void attend(int64_t i, float *scratch) {
        int64_t split;
        const Unit unit = find(i, split);
        Rows rows = rows_in(scratch, unit);
        auto *offsets = reinterpret_cast<int64_t *>(scratch);
        for (int64_t row = 0; row < rows.count; row++) rows.largest[row] = -kInfinity, rows.sum[row] = 0;
        std::memset(rows.value, 0, rows.count * rows.width * sizeof(float));
        load_queries<T>(args_, unit, rows);
        if (unit.num_tokens * shape_.group <= kFewRows) attend_few<K>(args_, unit, rows, offsets);
        else attend_many<K>(args_, unit, rows, offsets, rows.sum + shape_.rows);
        const Cut &cut = cuts_[unit.seq];
        for (int64_t row = 0; row < rows.count; row++) {
            if (cut.splits == 1) {
                finish(unit, row, rows.largest[row], rows.sum[row], rows.value + row * rows.width);
            } else {
                float *partial = partial_of(cut, i, row);
                partial[0] = rows.largest[row], partial[1] = rows.sum[row];
                std::memcpy(partial + 2, rows.value + row * rows.width, rows.width * sizeof(float));
            }
        }
    }

    float *partial_of(const Cut &cut, int64_t i, int64_t row) const {
        return partials_ + ((cut.first_partial + i - cut.first_unit) * shape_.rows + row) * shape_.row_floats;
    }

    // The first of the units that share their queries merges all of them.
    void merge_splits(int64_t i, float *scratch) {
        int64_t split;
        const Unit unit = find(i, split);
        const Cut &cut = cuts_[unit.seq];
        if (cut.splits == 1 || split != 0) return;
        const Rows rows = rows_in(scratch, unit);
        for (int64_t row = 0; row < rows.count; row++) {
            float largest = -kInfinity, sum = 0, *value = rows.value;
            for (int64_t s = 0; s < cut.splits; s++) largest = larger(largest, partial_of(cut, i + s, row)[0]);
            std::memset(value, 0, rows.width * sizeof(float));
            for (int64_t s = 0; s < cut.splits; s++) {
                const float *partial = partial_of(cut, i + s, row);
                if (!(partial[0] > -kInfinity)) continue;
                const float scale = ::expf(partial[0] - largest);
                sum += partial[1] * scale;
                for (int64_t d = 0; d < rows.width; d += W)
                    store(value + d, load(value + d) + load(partial + 2 + d) * scale);
            }
            finish(unit, row, largest, sum, value);
        }
    }

    // Divides by the denominator, the sink included, and writes one row of out and lse.
    void finish(const Unit &unit, int64_t row, float largest, float sum, const float *value) const {
        const Place place = place_of(args_, unit, row);
        const int64_t head = place.head, dim = args_.kv.head_dim;
        const int64_t at = (unit.first_token + place.token) * args_.num_q_heads + head;
        float scale = 1;
        if (args_.sinks) {
            const float top = larger(largest, args_.sinks[head]);
            if (top > -kInfinity) {
                scale = ::expf(largest - top);
                sum = sum * scale + ::expf(args_.sinks[head] - top);
                largest = top;
            }
        }
        scale = sum == 0 ? 0 : scale / sum;
        T *out = static_cast<T *>(args_.out) + at * dim;
        for (int64_t d = 0; d < dim; d += kStep) {
            const Step x = load_step(value + d);
            store_step(out + d, {x.first * scale, x.second * scale}, dim - d);
        }
        if (args_.lse) args_.lse[at] = sum == 0 ? -kInfinity : largest + ::logf(sum);
    }

    void pad() const {
        const int64_t first = args_.query_start[args_.num_seqs] * static_cast<int64_t>(args_.num_q_heads);
        const int64_t stop = args_.num_tokens * args_.num_q_heads, dim = args_.kv.head_dim;
        if (first == stop) return;
        std::memset(static_cast<T *>(args_.out) + first * dim, 0, (stop - first) * dim * sizeof(T));
        for (int64_t row = first; args_.lse && row < stop; row++) args_.lse[row] = -kInfinity;
    }

    const pagemgr_attention_args &args_;
    const Shape shape_;
    Cut *const cuts_;
    float *const scratch_;   // [threads][thread_floats]
    float *const partials_;  // [units that share queries][rows][row_floats]
};

}  // namespace

int64_t attention_workspace(const pagemgr_attention_args &args) {
    const Shape shape(args);
    const int64_t floats = shape.threads * shape.thread_floats + shape.most_partials() * shape.rows * shape.row_floats;
    return align((args.num_seqs + 1) * static_cast<int64_t>(sizeof(Cut))) + align(floats * 4);
}

template <class K>
void attend_quantised(const pagemgr_attention_args &args) {
    switch (args.kv.dtype) {
        case PAGEMGR_FLOAT16:
            return Attention<Half, K>(args).run();
        case PAGEMGR_BFLOAT16:
            return Attention<OrderedBfloat, K>(args).run();
        default:
            return Attention<float, K>(args).run();
    }
}

void attention(const pagemgr_attention_args &args) {
    switch (args.kv.kv_dtype) {
        case PAGEMGR_KV_FLOAT8_E4M3FN:
            return attend_quantised<E4m3>(args);
        case PAGEMGR_KV_FLOAT8_E5M2:
            return attend_quantised<E5m2>(args);
        case PAGEMGR_KV_INT8:
            return attend_quantised<Int8>(args);
    }
    switch (args.kv.dtype) {
        case PAGEMGR_FLOAT16:
            return Attention<Half, Half>(args).run();
        case PAGEMGR_BFLOAT16:
            return Attention<Bfloat, Bfloat>(args).run();
        default:
            return Attention<float, float>(args).run();
    }
}

}  // namespace pagemgr::PAGEMGR_VARIANT
