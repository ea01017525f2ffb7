// The C contract between llama.cpp's internals (layer_eval.cpp) and Rust (src/).
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
//     changed: a failed dim_stage_evaluate() leaves every session as long as it was.
//   - "Thread: any" means any number of threads at once. "Thread: one" means one at a time per object; objects of the
//     same model are independent of each other.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// ---- status, errors, log ---------------------------------------------------------------------------------------

typedef enum dim_status {
    DIM_OK                  = 0,
    DIM_INVALID_ARGUMENT    = 1,   // a parameter that no model would accept
    DIM_LOAD_FAILED         = 2,   // llama.cpp refused the file
    DIM_CANCELLED           = 3,   // the progress callback said stop
    DIM_UNSUPPORTED         = 4,   // a model whose blocks cannot be evaluated apart (the message says why)
    DIM_OUT_OF_MEMORY       = 5,   // the KV cache or the compute buffers could not be allocated
    DIM_TOO_MANY_ROWS       = 6,   // got rows, expected at most
    DIM_UNKNOWN_SESSION     = 7,   // row, session; expected: number of sessions
    DIM_WRONG_POSITION      = 8,   // row, session; got position, expected position
    DIM_CONTEXT_FULL        = 9,   // row, session; got position, expected: positions there are
    DIM_WRONG_INPUT         = 10,  // tokens for a stage that takes hidden rows, or the other way round
    DIM_WRONG_OUTPUT        = 11,  // logits from a stage without lm_head, or hidden rows from one with it
    DIM_UNKNOWN_TOKEN       = 12,  // row; got token, expected: vocabulary size
    DIM_WRONG_SIZE          = 13,  // a buffer: got elements, expected elements
    DIM_INPUT_NOT_FINITE    = 14,  // row; got: how many values, in all rows
    DIM_OUTPUT_NOT_FINITE   = 15,  // row, block; got: how many values, in all rows; max_abs
    DIM_OUTPUT_OVERFLOWS    = 16,  // row, block; got: how many values beyond F16; max_abs
    DIM_COMPUTE_FAILED      = 17,  // the backend reported a failure
    DIM_NO_TOKENIZER        = 18,  // the model carries no vocabulary
    DIM_INTERNAL            = 19,  // an exception that no other status names
} dim_status;

typedef struct dim_fault {
    int64_t row;        // index in the call's rows, -1 where none applies
    int64_t session;    // -1 where none applies
    int64_t block;      // as numbered in the file, -1 where none applies (the logits' block is the last one)
    int64_t got;
    int64_t expected;
    float   max_abs;    // largest finite |x| seen
} dim_fault;

// The sentence for the last failure of this thread; never NULL. Valid until this thread's next call into this header.
// Thread: any.
const char * dim_last_error(void);

typedef enum dim_log_level { DIM_LOG_SILENT = 0, DIM_LOG_WARNINGS = 1, DIM_LOG_EVERYTHING = 2 } dim_log_level;

// What of llama.cpp's own log goes to stderr. The default, before any call, is nothing; errors are kept for
// dim_last_error() all the same. Process-wide. Thread: any.
void dim_log_set(dim_log_level level);

// ---- devices -----------------------------------------------------------------------------------------------------

typedef struct dim_device {
    const char * name;          // static for the life of the process, as "Vulkan0"; what dim_model_params.device takes
    const char * description;   // static for the life of the process, as "llvmpipe (LLVM 15.0.6, 256 bits)"
    bool         is_gpu;        // can hold offloaded blocks
    uint64_t     memory_free_bytes;
    uint64_t     memory_total_bytes;
} dim_device;

// Number of devices llama.cpp was built with and found on this machine; the CPU is one of them. Thread: any.
size_t dim_device_count(void);

// Describes device `index`. DIM_INVALID_ARGUMENT beyond the count. Thread: any.
dim_status dim_device_describe(size_t index, dim_device * out);

// ---- model -------------------------------------------------------------------------------------------------------

struct llama_model;   // llama.cpp's own; owned by whoever dim_model_load() gave it to

// Called on the loading thread with 0..1; false stops the load (DIM_CANCELLED). Must not unwind.
typedef bool (*dim_progress)(float fraction, void * user);

// What of a file is loaded.
typedef enum dim_model_part {
    DIM_MODEL_WHOLE     = 0,
    DIM_MODEL_TOKENIZER = 1,    // no weights, and no dimensions: dim_model_describe() has zeros for all but the tokens
    DIM_MODEL_WEIGHTS   = 2,    // no tokenizer, whose texts take some 50 MB; n_vocab as in the whole
} dim_model_part;

typedef struct dim_model_params {
    dim_model_part part;
    int32_t      gpu_blocks;    // blocks put on the GPU, counted from the last; -1: all of them; 0: no GPU is touched
    bool         use_mmap;      // map the file instead of reading it: a file truncated under the map is SIGBUS
    bool         lm_head;       // the file's output matrix will be used; false (head, middle): it stays in host memory,
                                // as the same bytes as the token embedding, and on no device
    bool         repack;        // the CPU may keep quantised matrices in an order of its own, which is faster and a second
                                // copy of them; false: all weights stay where the file has them, mapped if use_mmap
    const char * device;        // one GPU by name, or NULL: all that there are
    dim_progress progress;      // may be NULL
    void *       progress_user; // passed on
} dim_model_params;

// Loads one GGUF, or all parts of a split one in order. On DIM_OK *out is a model that the caller owns and frees with
// dim_model_free(); it must outlive its stages and stock contexts. `paths`: n_paths NUL-terminated strings, copied.
// Thread: any.
dim_status dim_model_load(const char * const * paths, size_t n_paths, const dim_model_params * params,
                          struct llama_model ** out);

// Frees a model. NULL is allowed. Thread: one, after everything made from it is gone.
void dim_model_free(struct llama_model * model);

typedef struct dim_model_info {
    uint32_t n_blocks;
    uint32_t n_embd;
    uint32_t n_vocab;
    uint32_t n_ctx_train;
    uint64_t weights_bytes;     // of all tensors as stored in the file
    bool     has_tokenizer;
    int32_t  bos, eos;          // -1: none
    bool     add_bos;           // what tokenize's add_special would do
} dim_model_info;

// Thread: any.
dim_status dim_model_describe(const struct llama_model * model, dim_model_info * out);

// Where the weights are, seen from the tensors themselves and not from what was asked for.
typedef struct dim_offload {
    uint32_t blocks_on_device;  // blocks with every one of their tensors on a GPU
    bool     lm_head_on_device;
    uint64_t device_bytes;
    uint64_t host_bytes;
} dim_offload;

// Thread: any.
dim_status dim_model_offload(const struct llama_model * model, dim_offload * out);

// Text by name. Both write at most `capacity` bytes, no NUL, and set *length to the full length; more than `capacity`
// means: call again with as much. *length is -1 where there is no such thing. `text` may be NULL if capacity is 0.
// Thread: any.
dim_status dim_model_arch(const struct llama_model * model, char * text, size_t capacity, int64_t * length);
dim_status dim_model_meta(const struct llama_model * model, const char * key, char * text, size_t capacity, int64_t * length);
// The chat template: the default one, or another by `name` (NULL: the default).
dim_status dim_model_chat_template(const struct llama_model * model, const char * name, char * text, size_t capacity, int64_t * length);

// Text to tokens. Writes at most `capacity` tokens and sets *n_tokens to the full number; more than `capacity` means:
// call again with as much. `text` needs no NUL. Thread: any.
dim_status dim_model_tokenize(const struct llama_model * model, const char * text, size_t length, bool add_special,
                              bool parse_special, int32_t * tokens, size_t capacity, int64_t * n_tokens);

// The bytes a token stands for, which need not be UTF-8 by themselves; special tokens as their text if `special`,
// else as nothing. Lengths as dim_model_meta(). Thread: any.
dim_status dim_model_token_bytes(const struct llama_model * model, int32_t token, bool special, char * bytes, size_t capacity,
                                 int64_t * length);

// Sets *is_eog: the token ends a generation. False for a token outside the vocabulary. Thread: any.
dim_status dim_model_is_eog(const struct llama_model * model, int32_t token, bool * is_eog);

// ---- stage: a range of blocks --------------------------------------------------------------------------------------

typedef enum dim_flash_attn { DIM_FLASH_ATTN_AUTO = -1, DIM_FLASH_ATTN_OFF = 0, DIM_FLASH_ATTN_ON = 1 } dim_flash_attn;

// Of cached keys and values. F16 is llama.cpp's default, and queries are then rounded to it as well.
typedef enum dim_kv_type { DIM_KV_F16 = 0, DIM_KV_F32 = 1 } dim_kv_type;

typedef struct dim_context_params {
    uint32_t       n_ctx;        // positions of one session
    uint32_t       n_batch;      // most rows of one call
    uint32_t       n_ubatch;     // most rows computed at once; a call is cut into chunks of it
    uint32_t       n_threads;
    uint32_t       max_sessions; // each with n_ctx positions of its own
    dim_flash_attn flash_attn;
    dim_kv_type    kv_type;
    bool           f32_products; // stages only: products with matrices of other types are computed with their rows turned to
                                 // F32, a few at a time, where llama.cpp rounds what it multiplies them with to their type
    uint32_t       max_outputs;  // stock only: most rows of logits of one call; 0: n_batch, llama.cpp's default
} dim_context_params;

typedef struct dim_stage_params {
    dim_context_params context;
    uint32_t first, last;        // blocks [first, last) of the file
    bool     takes_tokens;       // the range starts the model: tokens in; else hidden rows in. Needs first == 0
    bool     has_lm_head;        // the range ends the model: logits out; else hidden rows out. Needs last == n_blocks
} dim_stage_params;

typedef struct dim_stage dim_stage;

// Makes a stage. Refuses (DIM_UNSUPPORTED) models whose blocks cannot be evaluated apart, and finds out by building the
// graph once, at its largest; so the buffers are allocated when it returns: a KV cache of its own blocks (of all blocks of
// the file where these differ in size, or some attend to a window) and room for the largest graph. On DIM_OK *out belongs to the caller, who
// frees it with dim_stage_free() before the model. Thread: any.
dim_status dim_stage_create(struct llama_model * model, const dim_stage_params * params, dim_stage ** out);

// Frees a stage and its KV cache. NULL is allowed. Thread: one.
void dim_stage_free(dim_stage * stage);

typedef struct dim_context_info {
    uint32_t n_batch;           // as asked for, or less where the context is smaller
    uint32_t n_ubatch;
    bool     flash_attn;        // what `auto` came to
    uint64_t kv_bytes;
    uint64_t compute_bytes;     // graph buffers of all backends
    uint64_t output_bytes;      // host buffer for logits (stock), 1 row per session in a stage
} dim_context_info;

// Thread: one.
dim_status dim_stage_describe(const dim_stage * stage, dim_context_info * out);

typedef struct dim_row {
    uint32_t session;
    uint32_t position;          // must be the session's length: rows of a session follow each other
    bool     want_output;       // logits wanted for this row; hidden stages give every row
} dim_row;

typedef enum dim_dtype { DIM_TOKENS = 0, DIM_F16 = 1, DIM_F32 = 2, DIM_LOGITS = 3 } dim_dtype;

// Evaluates n_rows rows, of any sessions in any order, as long as the positions of each session go on where it ended.
//   input:  DIM_TOKENS int32_t[n_rows] | DIM_F16 uint16_t[n_rows * n_embd] | DIM_F32 float[n_rows * n_embd]
//   output: DIM_F16, DIM_F32: n_rows * n_embd values, in the order of `rows`; DIM_LOGITS: float[wanted rows * n_vocab]
//   input_len, output_len: elements there are; more output than needed is allowed
// Sets *n_written to the rows written. Input and output must not overlap. On failure the sessions are as before; the
// output buffer may hold anything. Thread: one.
dim_status dim_stage_evaluate(dim_stage * stage, const dim_row * rows, size_t n_rows,
                              dim_dtype input_type, const void * input, size_t input_len,
                              dim_dtype output_type, void * output, size_t output_len,
                              size_t * n_written, dim_fault * fault);

// Forgets a session's positions from `position` on; at most its length, else DIM_WRONG_POSITION. 0 clears it. Thread: one.
dim_status dim_stage_rewind(dim_stage * stage, uint32_t session, uint32_t position, dim_fault * fault);

// Sets *length to the positions a session holds. Thread: one.
dim_status dim_stage_length(const dim_stage * stage, uint32_t session, uint32_t * length, dim_fault * fault);

// How often the last graph could be used again, and how often one had to be built. Thread: one.
void dim_stage_graphs(const dim_stage * stage, uint64_t * reused, uint64_t * built);

typedef struct dim_block_stats {
    uint64_t calls;             // evaluations of up to n_ubatch rows
    uint64_t rows;
    uint64_t nanoseconds;       // sum; blocks before it excluded. The first block's has the embedding in it
    float    max_abs;           // largest finite |x| of the block's output
    uint64_t not_finite;        // values of the block's output that are not finite
} dim_block_stats;

// Starts (clearing the counts) or stops watching every block's output. Watching costs time: every block is waited for.
// Values and results do not change. Thread: one.
dim_status dim_stage_watch(dim_stage * stage, bool on);

// Copies the counts: `capacity` must be at least last - first, plus one where the stage has an lm_head (its time, its
// logits). Sets *n. Thread: one.
dim_status dim_stage_block_stats(const dim_stage * stage, dim_block_stats * out, size_t capacity, size_t * n);

// ---- stock: llama_decode() and nothing else --------------------------------------------------------------------------

typedef struct dim_stock dim_stock;

// The whole model by llama.cpp's own public API, with the same settings as a stage. Ownership as dim_stage_create().
// Thread: any.
dim_status dim_stock_create(struct llama_model * model, const dim_context_params * params, dim_stock ** out);

// NULL is allowed. Thread: one.
void dim_stock_free(dim_stock * stock);

// Thread: one.
dim_status dim_stock_describe(const dim_stock * stock, dim_context_info * out);

// As dim_stage_evaluate() with tokens in and logits out. Thread: one.
dim_status dim_stock_decode(dim_stock * stock, const dim_row * rows, size_t n_rows, const int32_t * tokens, size_t tokens_len,
                            float * logits, size_t logits_len, size_t * n_written, dim_fault * fault);

// As their namesakes. Thread: one.
dim_status dim_stock_rewind(dim_stock * stock, uint32_t session, uint32_t position, dim_fault * fault);
dim_status dim_stock_length(const dim_stock * stock, uint32_t session, uint32_t * length, dim_fault * fault);

// ---- rows of ggml types ------------------------------------------------------------------------------------------------

typedef struct dim_type_info {
    const char * name;          // static, as "q8_0"
    uint32_t     block_values;  // values of one block; a row is a whole number of blocks
    uint32_t     block_bytes;
    bool         to_f32;        // dim_dequantize_rows() knows it
    bool         from_f32;      // dim_quantize_rows() knows it
} dim_type_info;

// Describes ggml type number `type`; DIM_INVALID_ARGUMENT for one that is not, or no longer, a type. Thread: any.
dim_status dim_type_describe(uint32_t type, dim_type_info * out);

// n_rows * n_per_row values to rows of `type`; out_len must be exactly the bytes they take. Values must be finite
// (DIM_INPUT_NOT_FINITE, with the row). Types that need an importance matrix are DIM_INVALID_ARGUMENT. Thread: any.
dim_status dim_quantize_rows(uint32_t type, const float * values, size_t n_rows, size_t n_per_row, uint8_t * out, size_t out_len,
                             dim_fault * fault);

// The other way; rows_len must be exactly the bytes n_rows rows take. `rows` needs no alignment. Thread: any.
dim_status dim_dequantize_rows(uint32_t type, const uint8_t * rows, size_t rows_len, size_t n_rows, size_t n_per_row, float * out,
                               dim_fault * fault);

// ---- for comparisons -----------------------------------------------------------------------------------------------------

// Writes the model at `from` to `to` as `type`, "q8_0" or "q4_k_m", as llama.cpp's own quantiser does it. On failure `to`
// may hold a part of it. A file that passes no check of its own can make llama.cpp abort(): check it first. Thread: any.
dim_status dim_model_quantise(const char * from, const char * to, const char * type, uint32_t n_threads);

#ifdef DIM_RPC
// Serves this machine's CPU at `endpoint` ("host:port", IPv4) with llama.cpp's RPC backend, without a cache, to one client
// after the other. Does not return unless it cannot serve. What a client sends can make it abort(): run it in a process of
// its own. Thread: one.
dim_status dim_rpc_serve(const char * endpoint, uint32_t n_threads);

// As dim_model_load(), with the last n_blocks blocks and their KV cache on the RPC server at `endpoint`, and embedding,
// output norm and lm_head here. A server that cannot be reached makes llama.cpp abort(): dial it first. Thread: any.
dim_status dim_rpc_model_load(const char * const * paths, size_t n_paths, const char * endpoint, uint32_t n_blocks, bool use_mmap,
                              struct llama_model ** out);
#endif

#ifdef __cplusplus
}
#endif
