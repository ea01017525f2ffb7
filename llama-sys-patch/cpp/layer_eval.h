// The C contract between llama.cpp's internals (the other files here) and Rust (src/).
//
// What it offers: a model loaded by llama.cpp; a *stage*, which evaluates a contiguous range of the model's blocks
// with a KV cache of its own; a *stock* context, which is llama_decode() and nothing else, to compare with; the
// tokenizer; ggml's row quantisers; llama.cpp's log.
//
// What holds for every function here:
//   - No exception leaves it, and no input makes it abort(): whatever could trip a GGML_ASSERT is checked first and
//     answered with a status. Pointers are trusted: they must be valid for the sizes given, and not NULL unless NULL
//     is said to be allowed.
//   - DIM_OK is 0. After any other status dim_last_error() has a sentence for people (thread-local), and the dim_fault,
//     where one is taken, has the numbers. A fault is written on failure only.
//   - On failure, outputs given by pointer hold what they held before, except where said otherwise, and no object has
//     changed: a failed dim_stage_evaluate() leaves every session as long as it was, or lost where that cannot be
//     (DIM_SESSION_LOST).
//   - "Thread: any" means any number of threads at once. "Thread: one" means one at a time per object; objects of the
//     same model are independent of each other.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// ---- status, errors, log --------------------------------------------------------------------------------------------

typedef enum dim_status {
    DIM_OK = 0,
    DIM_INVALID_ARGUMENT = 1,     // a parameter that no model would accept
    DIM_LOAD_FAILED = 2,          // llama.cpp refused the file
    DIM_CANCELLED = 3,            // the progress callback said stop
    DIM_UNSUPPORTED = 4,          // a kind of model that no range of can be evaluated (the message says why)
    DIM_OUT_OF_MEMORY = 5,        // the KV cache or the compute buffers could not be allocated
    DIM_TOO_MANY_ROWS = 6,        // got rows, expected at most
    DIM_UNKNOWN_SESSION = 7,      // row, session; expected: number of sessions
    DIM_WRONG_POSITION = 8,       // row, session; got position, expected position
    DIM_CONTEXT_FULL = 9,         // row, session; got position, expected: positions there are
    DIM_WRONG_INPUT = 10,         // tokens for a stage that takes hidden rows, or the other way round
    DIM_WRONG_OUTPUT = 11,        // logits from a stage without lm_head, or hidden rows from one with it
    DIM_UNKNOWN_TOKEN = 12,       // row; got token, expected: vocabulary size
    DIM_WRONG_SIZE = 13,          // a buffer: got elements, expected elements
    DIM_INPUT_NOT_FINITE = 14,    // row; got: how many values, in all rows
    DIM_OUTPUT_NOT_FINITE = 15,   // row, block; got: how many values, in all rows; max_abs
    DIM_OUTPUT_OVERFLOWS = 16,    // row, block; got: how many values beyond F16; max_abs
    DIM_COMPUTE_FAILED = 17,      // the backend reported a failure
    DIM_NO_TOKENIZER = 18,        // the model carries no vocabulary
    DIM_INTERNAL = 19,            // an exception that no other status names
    // row, session: a call that failed left a recurrent state half-way; clear the session
    DIM_SESSION_LOST = 20,
    DIM_CANNOT_REWIND = 21,   // session; got position; expected: the lowest position, beside 0, it can go back to
    DIM_REFUSED = 24,         // a template, a grammar or an answer that is not as it should be (the message says how)
    DIM_BAD_SLICE = 22,       // a slice's description of what it lacks; row: which entry, -1: all of them
    DIM_NOT_APART = 23,       // a range that cannot be evaluated apart: dim_last_refusal() says why
} dim_status;

typedef struct dim_fault {
    int64_t row;       // index in the call's rows, -1 where none applies
    int64_t session;   // -1 where none applies
    int64_t block;     // as numbered in the file, -1 where none applies (the logits' block is the last one)
    int64_t got;
    int64_t expected;
    float max_abs;   // largest finite |x| seen
} dim_fault;

// The sentence for the last failure of this thread; never NULL. Valid until this thread's next call into this header.
// Thread: any.
const char * dim_last_error(void);

// What keeps a range from being evaluated apart, and which of dim_refusal's fields say more.
typedef enum dim_reason {
    DIM_READS_WEIGHT = 1,    // it reads `name`, a weight of `block`
    DIM_LACKS_WEIGHT = 2,    // it reads the weight `name`, which the slice lacks
    DIM_READS_STATE = 3,     // it reads `state` of `block`, `name`, which other blocks write
    DIM_BOTH_WRITE = 4,      // no cut before `first`: the blocks before and behind it write `state` of `block`, `name`
    DIM_NO_LOGITS = 5,       // the model gives none
    DIM_NOTHING_COMES = 6,   // no tensor goes from the blocks before to these
    DIM_NOTHING_GOES = 7,    // no tensor goes from these to the blocks after
    DIM_CROSSES_VIEW = 8,    // `name`, which crosses an end, is a view of another tensor
    DIM_CROSSES_TYPE = 9,    // `name`, which crosses an end, is neither F32 nor I32
    DIM_CROSSES_UNEVEN = 10,   // `name`, which crosses an end, is not so much for each token
    DIM_CROSSES_FIXED = 11,    // `name`, which crosses an end, does not depend on the tokens
    DIM_CROSSES_OTHERS = 12,   // what crosses an end is not the same in every graph
} dim_reason;

typedef enum dim_state_kind {
    DIM_STATE_OTHER = 0,   // `name` is all there is to say
    DIM_STATE_KEYS = 1,
    DIM_STATE_VALUES = 2,
    DIM_STATE_RECURRENT = 3,
} dim_state_kind;

typedef struct dim_refusal {
    dim_reason reason;
    uint32_t first, last;   // the blocks [first, last)
    int64_t block;          // -1: of no block
    dim_state_kind state;
    char name[64];   // llama.cpp's, as "blk.3.attn_q.weight" or "cache_k_l3"; NUL-terminated; "" where there is none
    char arch[64];   // llama.cpp's name of the architecture; NUL-terminated
} dim_refusal;

// The reason of this thread's last DIM_NOT_APART; all zeros if there was none. Thread: any.
void dim_last_refusal(dim_refusal * out);

typedef enum dim_log_level { DIM_LOG_SILENT = 0, DIM_LOG_WARNINGS = 1, DIM_LOG_EVERYTHING = 2 } dim_log_level;

// What of llama.cpp's own log goes to stderr. The default, before any call, is nothing; errors are kept for
// dim_last_error() all the same. Process-wide. Thread: any.
void dim_log_set(dim_log_level level);

// Ends the process with `code`, at once: nothing is destroyed, nothing flushed. Does not return. Thread: any.
void dim_end_process(int code);

// ---- devices --------------------------------------------------------------------------------------------------------

typedef struct dim_device {
    const char * name;          // static for the life of the process, as "Vulkan0"; what dim_model_params.device takes
    const char * description;   // static for the life of the process, as "llvmpipe (LLVM 15.0.6, 256 bits)"
    bool is_gpu;                // can hold offloaded blocks
    uint64_t memory_free_bytes;
    uint64_t memory_total_bytes;
} dim_device;

// Number of devices llama.cpp was built with and found on this machine; the CPU is one of them. Thread: any.
size_t dim_device_count(void);

// Describes device `index`. DIM_INVALID_ARGUMENT beyond the count. Thread: any.
dim_status dim_device_describe(size_t index, dim_device * out);

// ---- model ----------------------------------------------------------------------------------------------------------

typedef struct dim_model dim_model;   // owned by whoever dim_model_load() gave it to
struct llama_model;                   // llama.cpp's own, inside it

// Called on the loading thread with 0..1; false stops the load (DIM_CANCELLED). Must not unwind.
typedef bool (*dim_progress)(float fraction, void * user);

// What of a file is loaded.
typedef enum dim_model_part {
    DIM_MODEL_WHOLE = 0,
    DIM_MODEL_TOKENIZER = 1,   // no weights, and no dimensions: dim_model_describe() has zeros for all but the tokens
    DIM_MODEL_WEIGHTS = 2,     // no tokenizer, whose texts take some 50 MB; n_vocab as in the whole
} dim_model_part;

typedef struct dim_model_params {
    dim_model_part part;
    // blocks of the file put on the GPU, counted from its last; -1: all; 0: no GPU is touched
    int32_t gpu_blocks;
    bool use_mmap;           // map the file instead of reading it: a file truncated under the map is SIGBUS
    bool lm_head;            // the file's output matrix will be used; false (head, middle): it stays in host memory,
                             // as the same bytes as the token embedding, and on no device
    bool repack;             // the CPU may keep quantised matrices in an order of its own, which is faster and a
                             // second copy of them; false: all weights stay where the file has them, mapped if
                             // use_mmap
    const char * device;     // one GPU by name, or NULL: all that there are
    dim_progress progress;   // may be NULL
    void * progress_user;    // passed on
} dim_model_params;

// Loads one GGUF, or all parts of a split one in order. A slice that says what it lacks (dim.absent.*) is loaded as the
// whole model with bytes for what it holds: blocks keep the model's numbers. On DIM_OK *out is a model that the caller
// owns and frees with dim_model_free(); it must outlive its stages and stock contexts. `paths`: n_paths NUL-terminated
// strings, copied. Thread: any.
dim_status dim_model_load(const char * const * paths, size_t n_paths, const dim_model_params * params, dim_model ** out,
                          dim_fault * fault);

// Frees a model. NULL is allowed. Thread: one, after everything made from it is gone.
void dim_model_free(dim_model * model);

// llama.cpp's model, which lives as long as `model` does and is not to be freed. Thread: any.
struct llama_model * dim_model_llama(const dim_model * model);

typedef struct dim_model_info {
    uint32_t n_blocks;                  // of the whole model; of the file, where the file is a model of its own
    uint32_t first_block, last_block;   // blocks [first, last) have weights here
    bool is_slice;                      // the rest of them have none
    uint32_t n_embd;
    uint32_t n_vocab;
    uint32_t n_ctx_train;
    uint64_t weights_bytes;   // of all tensors as stored in the file
    bool has_tokenizer;
    int32_t bos, eos;   // -1: none
    bool add_bos;       // what tokenize's add_special would do
    bool add_eos;
} dim_model_info;

// Thread: any.
dim_status dim_model_describe(const dim_model * model, dim_model_info * out);

// Where the weights are, seen from the tensors themselves and not from what was asked for.
typedef struct dim_offload {
    uint32_t blocks_on_device;   // blocks with every one of their tensors on a GPU
    bool lm_head_on_device;
    uint64_t device_bytes;
    uint64_t host_bytes;
} dim_offload;

// Thread: any.
dim_status dim_model_offload(const dim_model * model, dim_offload * out);

// Text by name. Both write at most `capacity` bytes, no NUL, and set *length to the full length; more than `capacity`
// means: call again with as much. *length is -1 where there is no such thing. `text` may be NULL if capacity is 0.
// Thread: any.
dim_status dim_model_arch(const dim_model * model, char * text, size_t capacity, int64_t * length);
dim_status dim_model_meta(const dim_model * model, const char * key, char * text, size_t capacity, int64_t * length);
// The chat template: the default one, or another by `name` (NULL: the default).
dim_status dim_model_chat_template(const dim_model * model, const char * name, char * text, size_t capacity,
                                   int64_t * length);

// Text to tokens. Writes at most `capacity` tokens and sets *n_tokens to the full number; more than `capacity` means:
// call again with as much. `text` needs no NUL. Thread: any.
dim_status dim_model_tokenize(const dim_model * model, const char * text, size_t length, bool add_special,
                              bool parse_special, int32_t * tokens, size_t capacity, int64_t * n_tokens);

// The bytes a token stands for, which need not be UTF-8 by themselves; special tokens as their text if `special`,
// else as nothing. Lengths as dim_model_meta(). Thread: any.
dim_status dim_model_token_bytes(const dim_model * model, int32_t token, bool special, char * bytes, size_t capacity,
                                 int64_t * length);

// Sets *is_eog: the token ends a generation. False for a token outside the vocabulary. Thread: any.
dim_status dim_model_is_eog(const dim_model * model, int32_t token, bool * is_eog);

// ---- stage: a range of blocks ---------------------------------------------------------------------------------------

typedef enum dim_flash_attn { DIM_FLASH_ATTN_AUTO = -1, DIM_FLASH_ATTN_OFF = 0, DIM_FLASH_ATTN_ON = 1 } dim_flash_attn;

// Of cached keys and values. F16 is llama.cpp's default, and queries are then rounded to it as well.
typedef enum dim_kv_type { DIM_KV_F16 = 0, DIM_KV_F32 = 1 } dim_kv_type;

typedef struct dim_context_params {
    uint32_t n_ctx;      // positions of one session
    uint32_t n_batch;    // most rows of one call
    uint32_t n_ubatch;   // most rows computed at once; a call is cut into chunks of it
    uint32_t n_threads;
    uint32_t max_sessions;   // each with n_ctx positions of its own
    uint32_t n_snapshots;    // rows of the last call that a recurrent session can be taken back by, where llama.cpp
                             // keeps snapshots for the architecture; each costs as much as the state. < n_ubatch
    dim_flash_attn flash_attn;
    dim_kv_type kv_type;
    bool f32_products;      // stages only: products with matrices of other types are computed with their rows
                            // turned to F32, a few at a time, where llama.cpp rounds what it multiplies them with
                            // to their type
    uint32_t max_outputs;   // stock only: most rows of logits of one call; 0: n_batch, llama.cpp's default
} dim_context_params;

typedef struct dim_stage_params {
    dim_context_params context;
    uint32_t first, last;   // blocks [first, last) of the model
    bool takes_tokens;      // the range starts the model: tokens in; else rows in. Needs first == 0
    bool has_lm_head;       // the range ends the model: logits out; else rows out. Needs last == n_blocks
} dim_stage_params;

typedef struct dim_stage dim_stage;

// Makes a stage. Refuses (DIM_NOT_APART) ranges that cannot be evaluated apart, and finds out by building the graph, at
// its largest; so the buffers are allocated when it returns: caches and states of its own
// blocks, and room for the largest graph. On DIM_OK *out belongs to the caller, who frees it with dim_stage_free()
// before the model. Thread: any.
dim_status dim_stage_create(dim_model * model, const dim_stage_params * params, dim_stage ** out);

// Frees a stage and its KV cache. NULL is allowed. Thread: one.
void dim_stage_free(dim_stage * stage);

typedef struct dim_context_info {
    uint32_t n_batch;   // as asked for, or less where the context is smaller
    uint32_t n_ubatch;
    bool flash_attn;   // what `auto` came to
    uint64_t kv_bytes;
    uint64_t compute_bytes;   // graph buffers of all backends
    uint64_t output_bytes;    // host buffer for logits (stock), 1 row per session in a stage
} dim_context_info;

// Thread: one.
dim_status dim_stage_describe(const dim_stage * stage, dim_context_info * out);

// ---- what crosses

typedef enum dim_value_type { DIM_VALUE_F32 = 0, DIM_VALUE_I32 = 1 } dim_value_type;

// One of the tensors that go from one range to the next: so many values of each token. A row is all of them, one after
// the other. For most models there is one, the hidden row of n_embd F32 values. As DIM_F16, F32 values take two bytes
// and I32 values still four.
typedef struct dim_crossing {
    dim_value_type type;
    uint32_t n_values;   // per token
    char name[64];       // for people: llama.cpp's, as "l_out-11"; NUL-terminated
} dim_crossing;

typedef enum dim_end { DIM_END_IN = 0, DIM_END_OUT = 1 } dim_end;

// Copies what comes in or goes out of a stage: none where that is tokens or logits. `capacity` may be 0, `out` then
// NULL. Sets *n to how many there are; more than `capacity` means: call again with as much. Thread: one.
dim_status dim_stage_crossing(const dim_stage * stage, dim_end end, dim_crossing * out, size_t capacity, size_t * n);

// The range reads token ids beside the rows that come in: dim_stage_evaluate() wants them. Thread: one.
bool dim_stage_reads_tokens(const dim_stage * stage);

// ---- evaluation

typedef struct dim_row {
    uint32_t session;
    uint32_t position;   // must be the session's length: rows of a session follow each other
    bool want_output;    // logits wanted for this row; hidden stages give every row
} dim_row;

typedef enum dim_dtype { DIM_TOKENS = 0, DIM_F16 = 1, DIM_F32 = 2, DIM_LOGITS = 3 } dim_dtype;

// Evaluates n_rows rows, of any sessions in any order, as long as the positions of each session go on where it ended.
//   tokens: int32_t[n_rows], the ids of the rows' tokens; may be NULL where dim_stage_reads_tokens() says no, and where
//           `input` is tokens
//   input:  DIM_TOKENS int32_t[n_rows] | DIM_F16 uint16_t[n_rows * w16] | DIM_F32 float[n_rows * w32]
//   output: DIM_F16, DIM_F32: n_rows rows, in the order of `rows`; DIM_LOGITS: float[wanted rows * n_vocab]
//   w32, w16: values of a row (dim_crossing): n_embd for most models; an I32 value is one float's place, or two
//           uint16_t's
//   input_len, output_len: elements there are; more output than needed is allowed
// Sets *n_written to the rows written. Input and output must not overlap. On failure the sessions are as before, or
// lost (DIM_SESSION_LOST: recurrent states cannot be taken back); the output buffer may hold anything. Thread: one.
dim_status dim_stage_evaluate(dim_stage * stage, const dim_row * rows, size_t n_rows, const int32_t * tokens,
                              dim_dtype input_type, const void * input, size_t input_len, dim_dtype output_type,
                              void * output, size_t output_len, size_t * n_written, dim_fault * fault);

// Forgets a session's positions from `position` on; at most its length, else DIM_WRONG_POSITION. 0 clears it, always.
// Below dim_stage_lowest(): DIM_CANNOT_REWIND. Thread: one.
dim_status dim_stage_rewind(dim_stage * stage, uint32_t session, uint32_t position, dim_fault * fault);

// Sets *position to the lowest one, beside 0, that the session can be taken back to: 0 for models without recurrent
// states. *lost: the session has to be cleared before anything else. Thread: one.
dim_status dim_stage_lowest(const dim_stage * stage, uint32_t session, uint32_t * position, bool * lost,
                            dim_fault * fault);

// Rows of its last call, less one, that any session can be taken back by; UINT32_MAX: any rows, as there are no recurrent
// states. Thread: any.
uint32_t dim_stage_snapshots(const dim_stage * stage);

// Sets *length to the positions a session holds. Thread: one.
dim_status dim_stage_length(const dim_stage * stage, uint32_t session, uint32_t * length, dim_fault * fault);

// ---- keys and values, for the same stage in another process

// Bytes that dim_stage_save() gives of each position; UINT64_MAX: the stage's memory is more than keys and values
// (recurrent states, ...), and the two functions below refuse it (DIM_UNSUPPORTED). Thread: one.
uint64_t dim_stage_saved_bytes(const dim_stage * stage);

// Copies the keys and values of a session's positions from .. to - 1. `size`: dim_stage_saved_bytes() for each of them, else
// DIM_WRONG_SIZE. Thread: one.
dim_status dim_stage_save(dim_stage * stage, uint32_t session, uint32_t from, uint32_t to, uint8_t * out, size_t size,
                          dim_fault * fault);

// Takes rows as evaluated: of one session, going on where it ends, with these tokens (int32_t[n_rows]) and the keys and
// values that dim_stage_save() gave of their positions in a stage of the same blocks, made in the same way. What they are
// is not looked at. On failure the session is as before. Thread: one.
dim_status dim_stage_restore(dim_stage * stage, const dim_row * rows, size_t n_rows, const int32_t * tokens,
                             const uint8_t * bytes, size_t size, dim_fault * fault);

// How often the last graph could be used again, and how often one had to be built. Thread: one.
void dim_stage_graphs(const dim_stage * stage, uint64_t * reused, uint64_t * built);

typedef struct dim_block_stats {
    uint64_t calls;   // evaluations of up to n_ubatch rows
    uint64_t rows;
    uint64_t nanoseconds;   // sum; blocks before it excluded. The first block's has the embedding in it
    float max_abs;          // largest finite |x| of the block's output
    uint64_t not_finite;    // values of the block's output that are not finite
} dim_block_stats;

// Starts (clearing the counts) or stops watching every block's output. Watching costs time: every block is waited for.
// Values and results do not change. Thread: one.
dim_status dim_stage_watch(dim_stage * stage, bool on);

// Copies the counts: `capacity` must be at least last - first, plus one where the stage has an lm_head (its time, its
// logits). Sets *n. Thread: one.
dim_status dim_stage_block_stats(const dim_stage * stage, dim_block_stats * out, size_t capacity, size_t * n);

// ---- plan: what a range needs, before anything is cut ---------------------------------------------------------------

typedef struct dim_plan dim_plan;

// Reads the keys and the list of tensors of a model, and no weights: of a whole one, or of a slice that says what it
// lacks. `paths` as dim_model_load(). On DIM_OK *out belongs to the caller. Refuses (DIM_UNSUPPORTED) what is no text
// decoder. Thread: any.
dim_status dim_plan_open(const char * const * paths, size_t n_paths, dim_plan ** out, dim_fault * fault);

// NULL is allowed. Thread: one.
void dim_plan_free(dim_plan * plan);

// The model, for dim_model_describe() and the like; it has no weights, and nothing can be made of it. Lives as long as
// the plan. Thread: one.
const dim_model * dim_plan_model(const dim_plan * plan);

// What the model keeps of past positions, for people: static, as "KV cache with sliding windows". Thread: one.
const char * dim_plan_memory(const dim_plan * plan);

typedef struct dim_range_plan {
    bool reads_tokens;
    size_t n_tensors;
    size_t n_in, n_out;                  // tensors that cross its two ends
    uint64_t weights_bytes;              // of these tensors, as stored
    uint64_t cache_bytes_per_position;   // of one session, as F16
    uint64_t state_bytes_per_session;    // that does not grow with positions
} dim_range_plan;

// Looks at the range [first, last), which dim_plan_tensor() and dim_plan_crossing() then speak of. DIM_NOT_APART: it
// cannot be evaluated apart. Thread: one.
dim_status dim_plan_range(dim_plan * plan, uint32_t first, uint32_t last, dim_range_plan * out);

// The name of tensor `index` that the range needs: its own blocks', what of others its graph reads, and the factors of
// the rotation. As dim_model_meta(). Thread: one.
dim_status dim_plan_tensor(const dim_plan * plan, size_t index, char * text, size_t capacity, int64_t * length);

// As dim_stage_crossing(). Thread: one.
dim_status dim_plan_crossing(const dim_plan * plan, dim_end end, dim_crossing * out, size_t capacity, size_t * n);

// DIM_OK if the model can be cut before block `block`: the blocks before it and those from it on can be evaluated
// apart, and no state is written by both; dim_plan_crossing() of DIM_END_IN then speaks of what crosses there. Else
// DIM_NOT_APART. Thread: one.
dim_status dim_plan_cut(dim_plan * plan, uint32_t block);

// ---- stock: llama_decode() and nothing else -------------------------------------------------------------------------

typedef struct dim_stock dim_stock;

// The whole model by llama.cpp's own public API, with the same settings as a stage. Ownership as dim_stage_create().
// Thread: any.
dim_status dim_stock_create(dim_model * model, const dim_context_params * params, dim_stock ** out);

// NULL is allowed. Thread: one.
void dim_stock_free(dim_stock * stock);

// Thread: one.
dim_status dim_stock_describe(const dim_stock * stock, dim_context_info * out);

// As dim_stage_evaluate() with tokens in and logits out. Thread: one.
dim_status dim_stock_decode(dim_stock * stock, const dim_row * rows, size_t n_rows, const int32_t * tokens,
                            size_t tokens_len, float * logits, size_t logits_len, size_t * n_written,
                            dim_fault * fault);

// As their namesakes. Thread: one.
dim_status dim_stock_rewind(dim_stock * stock, uint32_t session, uint32_t position, dim_fault * fault);
dim_status dim_stock_length(const dim_stock * stock, uint32_t session, uint32_t * length, dim_fault * fault);
dim_status dim_stock_lowest(const dim_stock * stock, uint32_t session, uint32_t * position, bool * lost,
                            dim_fault * fault);

// ---- rows of ggml types ---------------------------------------------------------------------------------------------

typedef struct dim_type_info {
    const char * name;       // static, as "q8_0"
    uint32_t block_values;   // values of one block; a row is a whole number of blocks
    uint32_t block_bytes;
    bool to_f32;     // dim_dequantize_rows() knows it
    bool from_f32;   // dim_quantize_rows() knows it
} dim_type_info;

// Describes ggml type number `type`; DIM_INVALID_ARGUMENT for one that is not, or no longer, a type. Thread: any.
dim_status dim_type_describe(uint32_t type, dim_type_info * out);

// n_rows * n_per_row values to rows of `type`; out_len must be exactly the bytes they take. Values must be finite
// (DIM_INPUT_NOT_FINITE, with the row). Types that need an importance matrix are DIM_INVALID_ARGUMENT. Thread: any.
dim_status dim_quantize_rows(uint32_t type, const float * values, size_t n_rows, size_t n_per_row, uint8_t * out,
                             size_t out_len, dim_fault * fault);

// The other way; rows_len must be exactly the bytes n_rows rows take. `rows` needs no alignment. Thread: any.
dim_status dim_dequantize_rows(uint32_t type, const uint8_t * rows, size_t rows_len, size_t n_rows, size_t n_per_row,
                               float * out, dim_fault * fault);

// ---- for comparisons ------------------------------------------------------------------------------------------------

// Writes the model at `from` to `to` as `type`, "q8_0" or "q4_k_m", as llama.cpp's own quantiser does it. On failure
// `to` may hold a part of it. A file that passes no check of its own can make llama.cpp abort(): check it first.
// Thread: any.
dim_status dim_model_quantise(const char * from, const char * to, const char * type, uint32_t n_threads);

#ifdef DIM_TEST_SUPPORT
// Architectures that llama.cpp has names for, and their names (static; "" beyond the count). Thread: any.
size_t dim_test_architectures(void);
const char * dim_test_architecture(size_t index);

// What an architecture's tiny model wants beyond the usual keys, as dim_test_write_model() takes it: option `index`;
// static, "" beyond the last. Thread: any.
const char * dim_test_option(const char * arch, size_t index);

// Writes a tiny random model. Options: "KEY=VALUE" sets a key (a KEY that starts with a dot gets the architecture's
// name before it; VALUE 3, 3.5, true, text, [1,2,3], or none for no key); "without TEXT" leaves out tensors with it in
// their name; "tied" the output matrix. Keys that an architecture does not accept may make llama.cpp abort(). Thread:
// any.
dim_status dim_test_write_model(const char * arch, uint32_t n_blocks, const char * const * options, size_t n_options,
                                const char * path);
#endif

#ifdef DIM_RPC
// Serves this machine's CPU at `endpoint` ("host:port", IPv4) with llama.cpp's RPC backend, without a cache, to one
// client after the other. Does not return unless it cannot serve. What a client sends can make it abort(): run it in a
// process of its own. Thread: one.
dim_status dim_rpc_serve(const char * endpoint, uint32_t n_threads);

// As dim_model_load(), with the last n_blocks blocks and their KV cache on the RPC server at `endpoint`, and embedding,
// output norm and lm_head here. A server that cannot be reached makes llama.cpp abort(): dial it first. Thread: any.
dim_status dim_rpc_model_load(const char * const * paths, size_t n_paths, const char * endpoint, uint32_t n_blocks,
                              bool use_mmap, dim_model ** out);
#endif

#ifdef __cplusplus
}
#endif
