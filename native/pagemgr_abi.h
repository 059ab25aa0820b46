/* The contract between pagemgr and a library of compiled kernels, version 3.
 *
 * This file has no directives, so that C, C++, nvcc and cffi's parser read the same text. Include it once in a
 * translation unit, after <stdint.h> and inside extern "C" for C++ (native/abi.hpp does both).
 *
 *   pool    [num_blocks][num_layers][key, value][num_kv_heads][block_size][head_dim]
 *           └────────── block_stride ──────────┘└ head_stride ┘└ token_stride ┘
 *
 * A quantised pool has its scales behind the keys and values of each layer, [key, value][num_kv_heads][block_size].
 *
 * What holds for every function:
 *   - A pointer called key, value, key_scale, value_scale, errors, query, out, lse, block_table, seq_lens,
 *     query_start, slot_mapping, pairs, source, target, sinks, alibi_slopes or workspace points to memory of the
 *     library's device: host memory for PAGEMGR_CPU, device memory for PAGEMGR_CUDA; there errors, source and target
 *     may also point to pinned host memory, by the address that the device knows it by. The args structs, and the
 *     arrays of pointers in pagemgr_merge_args, are host memory that is read before the call returns.
 *   - Strides count elements, and the last dimension is contiguous. A tensor for which no stride is given is
 *     contiguous throughout. No two pointers overlap unless said so.
 *   - The call returns once the work is queued on run.stream, or done where there are no streams. It allocates nothing,
 *     waits for nothing, prints nothing, and may be made from several threads at once.
 *   - The result is a pagemgr_status. Anything but PAGEMGR_OK means that nothing was queued, and pagemgr_message says
 *     why. What a library does not declare in pagemgr_capabilities it refuses with PAGEMGR_UNSUPPORTED.
 *   - What the numbers mean (masks, softcap, empty rows, unwritten slots that hold NaN) is defined by
 *     pagemgr.backends.Backend and tested by pagemgr.backends.conformance.
 */

enum pagemgr_version { PAGEMGR_ABI_VERSION = 3 };

enum pagemgr_status {
    PAGEMGR_OK = 0,
    PAGEMGR_INVALID = 1,     /* an argument contradicts another, or the workspace is too small */
    PAGEMGR_UNSUPPORTED = 2, /* well-formed, but not among what the library declares */
    PAGEMGR_DEVICE = 3       /* the device, its driver or its runtime failed */
};

enum pagemgr_device { PAGEMGR_CPU = 0, PAGEMGR_CUDA = 1 };

enum pagemgr_dtype { PAGEMGR_FLOAT32 = 0, PAGEMGR_FLOAT16 = 1, PAGEMGR_BFLOAT16 = 2 };

/* What a pool holds: elements of the call's dtype, or of one byte, with a scale for each token, head and key or value.
 * An element stands for itself times its scale. */
enum pagemgr_kv_dtype {
    PAGEMGR_KV_PLAIN = 0,
    PAGEMGR_KV_FLOAT8_E4M3FN = 1,
    PAGEMGR_KV_FLOAT8_E5M2 = 2,
    PAGEMGR_KV_INT8 = 3
};

/* What a kernel found in memory that the host does not look at. It reads or writes nothing there. */
enum pagemgr_error {
    PAGEMGR_BAD_BLOCK = 1,  /* a block id below 0, or num_blocks or more: block 0 is read instead, or nothing copied */
    PAGEMGR_BAD_SLOT = 2,   /* a slot below -1, or past the last block: nothing is written */
    PAGEMGR_BAD_LENGTH = 4  /* a length below 0 or above max_seq_len: taken for the nearer of them */
};

enum pagemgr_feature {
    PAGEMGR_CAUSAL = 1,
    PAGEMGR_NON_CAUSAL = 2,
    PAGEMGR_SLIDING_WINDOW = 4,
    PAGEMGR_SOFTCAP = 8,
    PAGEMGR_ALIBI = 16,
    PAGEMGR_SINKS = 32,
    PAGEMGR_LSE = 64
};

enum pagemgr_struct {
    PAGEMGR_STRUCT_CAPABILITIES = 0,
    PAGEMGR_STRUCT_WRITE_KV = 1,
    PAGEMGR_STRUCT_ATTENTION = 2,
    PAGEMGR_STRUCT_COPY_BLOCKS = 3,
    PAGEMGR_STRUCT_MERGE = 4
};

/* What a library can do. A list ends at its first 0; an empty list means any number. */
typedef struct {
    char variant[32];       /* for people: what runs here, such as "avx512" or "sm_90a" */
    int32_t device;         /* pagemgr_device */
    int32_t graph_capture;  /* 1 if write_kv and attention may be captured in a graph */
    uint32_t dtypes;        /* bit 1 << d for each pagemgr_dtype d */
    uint32_t kv_dtypes;     /* bit 1 << d for each pagemgr_kv_dtype d but PAGEMGR_KV_PLAIN, which goes without saying */
    uint32_t features;      /* pagemgr_feature, or-ed */
    int32_t head_dims[16];
    int32_t group_sizes[16]; /* query heads per K/V head */
    int32_t block_sizes[16];
} pagemgr_capabilities;

/* Where a call runs. */
typedef struct {
    void *stream;           /* cudaStream_t; null where there are no streams */
    int32_t *errors;        /* [1]: each pagemgr_error that is found is or-ed in, by the time the work is done; or null */
    int32_t device_index;   /* of PAGEMGR_CUDA; else 0 */
    int32_t num_threads;    /* threads that the call may use on the host, at least 1 */
} pagemgr_run;

/* One layer of the pool. */
typedef struct {
    void *key;              /* [num_blocks, num_kv_heads, block_size, head_dim] */
    void *value;            /* as key, with the same strides */
    float *key_scale;       /* [num_blocks, num_kv_heads, block_size], tokens contiguous; null for PAGEMGR_KV_PLAIN */
    float *value_scale;     /* as key_scale, with the same strides */
    int64_t block_stride;
    int64_t head_stride;
    int64_t token_stride;
    int64_t scale_block_stride;
    int64_t scale_head_stride;
    int64_t num_blocks;
    int32_t num_kv_heads;
    int32_t block_size;
    int32_t head_dim;
    int32_t dtype;          /* pagemgr_dtype of queries, new keys and values, and outputs */
    int32_t kv_dtype;       /* pagemgr_kv_dtype of key and value */
} pagemgr_kv;

/* Stores new tokens into their slots. No two tokens share a slot. Quantised, a row's scale is its largest magnitude over
 * the largest of the type (448, 57344, 127), and an element is what x / scale rounds to, half to even; a scale below the
 * least normal float is 0, and so are its elements. The scale of a row that holds an infinity or a NaN is not finite, and
 * its products with the elements are NaN. */
typedef struct {
    pagemgr_run run;
    pagemgr_kv kv;                /* written */
    const void *key;              /* [num_tokens, num_kv_heads, head_dim] */
    const void *value;            /* [num_tokens, num_kv_heads, head_dim] */
    const int64_t *slot_mapping;  /* [num_tokens]: block id * block_size + offset; -1 writes nothing */
    int64_t key_token_stride;
    int64_t key_head_stride;
    int64_t value_token_stride;
    int64_t value_head_stride;
    int64_t num_tokens;
} pagemgr_write_kv_args;

/* Attends the new tokens of each sequence, which are its last ones, to all of its tokens. The rows of query from
 * query_start[num_seqs] on are padding. */
typedef struct {
    pagemgr_run run;
    pagemgr_kv kv;
    const void *query;            /* [num_tokens, num_q_heads, head_dim]; head h reads K/V head h / group size */
    void *out;                    /* [num_tokens, num_q_heads, head_dim] */
    float *lse;                   /* [num_tokens, num_q_heads], natural log; or null */
    const int32_t *block_table;   /* [num_seqs, width]: block ids in token order */
    const int32_t *seq_lens;      /* [num_seqs], new tokens included */
    const int32_t *query_start;   /* [num_seqs + 1], ascending from 0 */
    const float *alibi_slopes;    /* [num_q_heads], or null */
    const float *sinks;           /* [num_q_heads], or null */
    void *workspace;              /* [workspace_bytes], aligned to 64; undefined before and after */
    int64_t workspace_bytes;      /* at least what pagemgr_attention_workspace says */
    int64_t query_token_stride;
    int64_t query_head_stride;
    int64_t table_stride;         /* of one sequence in block_table */
    int64_t num_tokens;
    int64_t max_query_len;        /* no sequence has more new tokens */
    int64_t max_seq_len;          /* no sequence is longer */
    int32_t num_seqs;
    int32_t num_q_heads;
    int32_t causal;               /* 0 or 1 */
    int32_t window;               /* tokens that a query sees, itself included; 0 is no window */
    float scale;
    float softcap;                /* 0 is none */
} pagemgr_attention_args;

/* Copies whole blocks, within a tier or between two. No block is written twice, and none is both read and written. */
typedef struct {
    pagemgr_run run;
    const void *source;     /* [num_source_blocks] blocks of block_bytes, source_stride_bytes apart */
    void *target;           /* [num_target_blocks] blocks of block_bytes, target_stride_bytes apart; may be the source */
    const int64_t *pairs;   /* [num_pairs, 2]: from, to */
    int64_t num_source_blocks;
    int64_t num_target_blocks;
    int64_t source_stride_bytes;
    int64_t target_stride_bytes;
    int64_t block_bytes;
    int64_t num_pairs;
} pagemgr_copy_blocks_args;

/* Combines attention over disjoint sets of keys. Where a part's lse is -inf, it counts for nothing. */
typedef struct {
    pagemgr_run run;
    const void *const *outs;    /* [num_parts] of [num_rows, head_dim], a row being one head of one token */
    const float *const *lses;   /* [num_parts] of [num_rows] */
    void *out;                  /* [num_rows, head_dim] */
    float *lse;                 /* [num_rows] */
    int64_t num_rows;
    int32_t num_parts;          /* at least 1 */
    int32_t head_dim;
    int32_t dtype;              /* pagemgr_dtype of outs and out */
} pagemgr_merge_args;

/* PAGEMGR_ABI_VERSION as the library was compiled; the only function that no version will ever change. */
int32_t pagemgr_abi_version(void);

/* sizeof the struct that a pagemgr_struct names, as the library was compiled; 0 for an unknown one. */
int64_t pagemgr_struct_size(int32_t which);

/* Why the last call by this thread failed, in one sentence; valid until this thread's next call. Never null. */
const char *pagemgr_message(void);

/* Fails with PAGEMGR_DEVICE if the library cannot run on this machine. */
int32_t pagemgr_get_capabilities(pagemgr_capabilities *capabilities);

/* How much workspace a call of pagemgr_attention needs. Depends on what is passed by value alone, and reads through no
 * pointer: calls that differ in nothing but pointers can share one workspace, one after the other. */
int32_t pagemgr_attention_workspace(const pagemgr_attention_args *args, int64_t *bytes);

int32_t pagemgr_write_kv(const pagemgr_write_kv_args *args);
int32_t pagemgr_attention(const pagemgr_attention_args *args);
int32_t pagemgr_copy_blocks(const pagemgr_copy_blocks_args *args);
int32_t pagemgr_merge(const pagemgr_merge_args *args);
