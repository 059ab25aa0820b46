/* A library of somebody else's: pagemgr_abi.h in plain C, float32 on the host, one scalar at a time. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "pagemgr_abi.h"

#ifndef VERSION /* what tests of the loader change */
#define VERSION PAGEMGR_ABI_VERSION
#endif
#ifndef EXTRA_BYTES
#define EXTRA_BYTES 0
#endif

static _Thread_local const char *message = "";

int32_t pagemgr_abi_version(void) { return VERSION; }

int64_t pagemgr_struct_size(int32_t which) {
    switch (which) {
        case PAGEMGR_STRUCT_CAPABILITIES: return sizeof(pagemgr_capabilities);
        case PAGEMGR_STRUCT_WRITE_KV: return sizeof(pagemgr_write_kv_args);
        case PAGEMGR_STRUCT_ATTENTION: return sizeof(pagemgr_attention_args) + EXTRA_BYTES;
        case PAGEMGR_STRUCT_COPY_BLOCKS: return sizeof(pagemgr_copy_blocks_args);
        case PAGEMGR_STRUCT_MERGE: return sizeof(pagemgr_merge_args);
        default: return 0;
    }
}

const char *pagemgr_message(void) { return message; }

int32_t pagemgr_get_capabilities(pagemgr_capabilities *capabilities) {
#ifdef NO_DEVICE
    message = "no device: plug one in";
    return PAGEMGR_DEVICE;
#endif
    memset(capabilities, 0, sizeof *capabilities);
    strcpy(capabilities->variant, "scalar");
    capabilities->dtypes = 1 << PAGEMGR_FLOAT32;
    capabilities->features = PAGEMGR_CAUSAL | PAGEMGR_NON_CAUSAL | PAGEMGR_LSE;
    capabilities->head_dims[0] = 64;
    capabilities->head_dims[1] = 128;
    return PAGEMGR_OK;
}

int32_t pagemgr_attention_workspace(const pagemgr_attention_args *args, int64_t *bytes) {
    *bytes = args->max_seq_len * (int64_t)sizeof(float);
    return PAGEMGR_OK;
}

int32_t pagemgr_write_kv(const pagemgr_write_kv_args *args) {
    const pagemgr_kv *kv = &args->kv;
    for (int64_t token = 0; token < args->num_tokens; token++) {
        int64_t slot = args->slot_mapping[token];
        for (int32_t head = 0; head < kv->num_kv_heads && slot >= 0; head++) {
            int64_t to = slot / kv->block_size * kv->block_stride + head * kv->head_stride +
                         slot % kv->block_size * kv->token_stride;
            memcpy((float *)kv->key + to,
                   (const float *)args->key + token * args->key_token_stride + head * args->key_head_stride,
                   kv->head_dim * sizeof(float));
            memcpy((float *)kv->value + to,
                   (const float *)args->value + token * args->value_token_stride + head * args->value_head_stride,
                   kv->head_dim * sizeof(float));
        }
    }
    return PAGEMGR_OK;
}

static float attend(const pagemgr_attention_args *args, int32_t seq, int32_t head, const float *query, int64_t keys,
                    float *out) {
    const pagemgr_kv *kv = &args->kv;
    float *weights = args->workspace, largest = -INFINITY, sum = 0;
    int64_t base = head / (args->num_q_heads / kv->num_kv_heads) * kv->head_stride;
    for (int pass = 0; pass < 2; pass++) {
        for (int64_t key = 0; key < keys; key++) {
            int64_t block = args->block_table[seq * args->table_stride + key / kv->block_size];
            int64_t at = base + block * kv->block_stride + key % kv->block_size * kv->token_stride;
            if (pass == 0) {
                weights[key] = 0;
                for (int32_t i = 0; i < kv->head_dim; i++) weights[key] += query[i] * ((float *)kv->key)[at + i];
                weights[key] *= args->scale;
                largest = fmaxf(largest, weights[key]);
            } else {
                float weight = expf(weights[key] - largest);
                sum += weight;
                for (int32_t i = 0; i < kv->head_dim; i++) out[i] += weight * ((float *)kv->value)[at + i];
            }
        }
    }
    for (int32_t i = 0; i < kv->head_dim && keys > 0; i++) out[i] /= sum;
    return keys > 0 ? largest + logf(sum) : -INFINITY;
}

int32_t pagemgr_attention(const pagemgr_attention_args *args) {
    if (args->window || args->softcap != 0 || args->sinks || args->alibi_slopes) {
        message = "nothing but a causal mask";
        return PAGEMGR_UNSUPPORTED;
    }
    int64_t dim = args->kv.head_dim;
    memset(args->out, 0, args->num_tokens * args->num_q_heads * dim * sizeof(float));
    for (int64_t row = 0; args->lse && row < args->num_tokens * args->num_q_heads; row++) args->lse[row] = -INFINITY;
    for (int32_t seq = 0; seq < args->num_seqs; seq++) {
        for (int64_t token = args->query_start[seq]; token < args->query_start[seq + 1]; token++) {
            int64_t keys = args->seq_lens[seq] - (args->causal ? args->query_start[seq + 1] - 1 - token : 0);
            for (int32_t head = 0; head < args->num_q_heads; head++) {
                const float *query = (const float *)args->query + token * args->query_token_stride;
                int64_t row = token * args->num_q_heads + head;
                float lse = attend(args, seq, head, query + head * args->query_head_stride, keys > 0 ? keys : 0,
                                   (float *)args->out + row * dim);
                if (args->lse) args->lse[row] = lse;
            }
        }
    }
    return PAGEMGR_OK;
}

int32_t pagemgr_copy_blocks(const pagemgr_copy_blocks_args *args) {
    for (int64_t pair = 0; pair < args->num_pairs; pair++)
        memcpy((char *)args->target + args->pairs[2 * pair + 1] * args->target_stride_bytes,
               (const char *)args->source + args->pairs[2 * pair] * args->source_stride_bytes, args->block_bytes);
    return PAGEMGR_OK;
}

#ifndef NO_MERGE
int32_t pagemgr_merge(const pagemgr_merge_args *args) {
    for (int64_t row = 0; row < args->num_rows; row++) {
        float largest = -INFINITY, sum = 0, *out = (float *)args->out + row * args->head_dim;
        memset(out, 0, args->head_dim * sizeof(float));
        for (int32_t part = 0; part < args->num_parts; part++) largest = fmaxf(largest, args->lses[part][row]);
        for (int32_t part = 0; part < args->num_parts && largest > -INFINITY; part++) {
            float weight = expf(args->lses[part][row] - largest);
            const float *from = (const float *)args->outs[part] + row * args->head_dim;
            for (int32_t i = 0; i < args->head_dim && weight > 0; i++) out[i] += weight * from[i];
            sum += weight;
        }
        for (int32_t i = 0; i < args->head_dim && sum > 0; i++) out[i] /= sum;
        args->lse[row] = sum > 0 ? largest + logf(sum) : -INFINITY;
    }
    return PAGEMGR_OK;
}
#endif
