/* The hot loops of the block manager, on the manager's own arrays. No directives, so that C++ and cffi's parser read
 * the same text (after <stdint.h>, inside extern "C").
 *
 * Nothing here decides anything that pagemgr/steps.py and pagemgr/prefix.py do not: they are the specification, and what
 * runs where there is no compiler. A function that meets what it does not handle says so and has changed nothing.
 */

enum pagemgr_manager_version { PAGEMGR_MANAGER_VERSION = 4 };

/* Blocks of one tier by name: open addressing with linear probing. */
typedef struct {
    int32_t *slots;         /* [mask + 1]: a block, or -1 for empty; more slots than blocks */
    uint8_t *names;         /* [num_blocks, 32], of published blocks */
    int32_t *parents;       /* [num_blocks]: the block before each published one, 0 before the first */
    int64_t mask;           /* a power of two, less 1 */
    uint8_t *groups;        /* [num_blocks]: layer groups of published blocks */
    int32_t *heads;         /* [heads_mask + 1]: PrefixIndex.heads */
    int64_t heads_mask;     /* a power of two, less 1 */
} pagemgr_index;

/* The arrays of a sequence table and of the device tier; addresses and lengths never change. Where layers form groups, a
 * sequence has a row for each. */
typedef struct {
    pagemgr_index index;
    int32_t *blocks;        /* [num_rows, width], the block table */
    int64_t *num_blocks;    /* [num_rows], as all rows below */
    int64_t *dropped;       /* columns that left the row's window */
    int64_t *window;        /* tokens, 0 for all */
    int64_t *reserved;
    int64_t *computed;
    int64_t *committed;
    int64_t *generation;
    int64_t *last_step;     /* newest step in flight, 0 idle, -1 moving between tiers */
    uint8_t *live;
    uint8_t *tier;
    uint8_t *roots;         /* [num_rows, 32] */
    int32_t *refs;          /* [num_blocks], as all blocks below */
    uint8_t *state;         /* BlockState */
    uint8_t *published;
    int32_t *pending;
    int32_t *stack;         /* blanks, the next one last */
    int32_t *tokens;        /* [num_blocks, block_size] */
    int64_t num_rows;
    int64_t max_sequences;  /* rows of each layer group */
    int64_t width;
    int64_t max_seq_len;
    int32_t block_size;
} pagemgr_manager;

/* One step. */
typedef struct {
    const int64_t *rows;         /* [num_seqs] */
    const int64_t *generations;  /* [num_seqs] */
    const int64_t *counts;       /* [num_seqs], each at least 1 */
    int64_t num_seqs;
    int64_t step;
    /* Found by pagemgr_manager_measure: */
    int64_t num_tokens;
    int64_t num_new_blocks;      /* num_copies included */
    int64_t num_copies;
    int64_t table_width;
    /* Written by pagemgr_manager_reserve: */
    int64_t *starts;             /* [num_seqs] */
    int64_t *previous;           /* [num_seqs] */
    int32_t *block_table;        /* [num_seqs, table_width] */
    int32_t *query_start;        /* [num_seqs + 1] */
    int64_t *slot_mapping;       /* [num_tokens] */
    int64_t *copied;             /* [num_copies], as the next two: positions in the batch whose tail is published, */
    int32_t *fresh;              /* the block that replaces it, */
    int32_t *tails;              /* and the tail, whose reference the caller gives back */
} pagemgr_manager_step;

int32_t pagemgr_manager_version(void);

/* 1 if pagemgr_manager_reserve can do the step: every sequence lives on the device, stays within its row, and has a tail
 * that it owns alone or that is published, which is copied. 0 if the specification has to look at it. Sequences are named once. */
int32_t pagemgr_manager_measure(const pagemgr_manager *manager, pagemgr_manager_step *step);

/* Gives the step the topmost num_new_blocks of num_free blanks, and fills what the step writes. */
void pagemgr_manager_reserve(pagemgr_manager *manager, pagemgr_manager_step *step, int64_t num_free);

/* The step has run: its sequences advance. Where ids is not null, those that are not negative are recorded, unless what
 * is before them is unknown, and blocks that became full are named and published. Sequences freed since are passed over.
 *
 * Returns how many blocks another block already stood for: duplicates[i] is {row, column, own, other}; it has room for
 * every block that can become full, as has sealed, which lists the *num_sealed blocks that were published. */
int64_t pagemgr_manager_commit(
    pagemgr_manager *manager, const pagemgr_manager_step *step, const int32_t *ids, int64_t *duplicates,
    int32_t *sealed, int64_t *num_sealed);

/* Ends idle sequences of the device tier, none of whose blocks waits for a fence. Their blocks lose a reference each,
 * children first; those left without one are pushed on the stack of num_free blanks, or become cached and are listed in
 * cached, which has room for all of them. Returns how many that are, or -1 if the specification has to look at it;
 * released[0] and released[1] count the open and the full blocks that nobody references any more. */
int64_t pagemgr_manager_free(
    pagemgr_manager *manager, const int64_t *rows, const int64_t *generations, int64_t num_seqs, int64_t num_free,
    int32_t *cached, int64_t *released);

/* Makes n sequences like one that is idle on the device: parents[g] is its row in layer group g, children[g * n + i] that
 * of child i. Its blocks gain n references each. 0, and nothing has changed, if the specification has to look at it. */
int32_t pagemgr_manager_fork(
    pagemgr_manager *manager, const int64_t *parents, int64_t num_groups, const int64_t *children, int64_t n);

/* Names of num_blocks full blocks of tokens, the first of which follows parent: [num_blocks, 32]. */
void pagemgr_manager_hash(
    const uint8_t *parent, const int32_t *tokens, int64_t num_blocks, int32_t block_size, uint8_t *names);

/* blocks[i] is the block published under a name, or -1. */
void pagemgr_index_find(const pagemgr_index *index, const uint8_t *names, int64_t count, int32_t *blocks);

/* Puts names on blocks; kept[i] is who stands for the name now, the block or one that already did. */
void pagemgr_index_publish(
    pagemgr_index *index, const int32_t *blocks, const uint8_t *names, int64_t count, int32_t *kept);

/* These published blocks lose their names. */
void pagemgr_index_forget(pagemgr_index *index, const int32_t *blocks, int64_t count);
