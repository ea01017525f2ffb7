// The C functions about stages, and which models and ranges are refused before anything is built.
#include "stage.h"

#include <algorithm>
#include <cstdio>

using namespace dim;

void dim::check_decoder(const llama_model & model) {
    const auto refuse = [&](const char * why) {
        fail(DIM_UNSUPPORTED, "the blocks of a %s model cannot be evaluated apart: %s", model.arch_name().c_str(), why);
    };
    if (model.hparams.vocab_only || model.vocab.n_tokens() == 0) refuse("the file gives no vocabulary size");
    if (llama_model_has_encoder(&model)) refuse("it has an encoder");
    if (!model.hparams.causal_attn) refuse("its attention is not causal");
}

void dim::give_crossing(const crossing & layout, dim_crossing * out, size_t capacity, size_t * n) {
    for (size_t i = 0; i < std::min(capacity, layout.parts.size()); i++) {
        const auto & part = layout.parts[i];
        out[i].type = part.type == GGML_TYPE_I32 ? DIM_VALUE_I32 : DIM_VALUE_F32;
        out[i].n_values = (uint32_t) part.n_values();
        std::snprintf(out[i].name, sizeof out[i].name, "%s", part.name.c_str());
    }
    *n = layout.parts.size();
}

static void check_range(const dim_model & model, const dim_stage_params & params) {
    const uint32_t n_blocks = model.llama->hparams.n_layer();
    if (params.first >= params.last || params.last > n_blocks) {
        fail(DIM_INVALID_ARGUMENT, "blocks %u..%u: the model has the blocks 0..%u", params.first, params.last,
             n_blocks);
    }
    if (params.takes_tokens && params.first != 0) {
        fail(DIM_INVALID_ARGUMENT, "a stage that takes tokens starts with block 0, not with %u", params.first);
    }
    if (params.has_lm_head && params.last != n_blocks) {
        fail(DIM_INVALID_ARGUMENT, "a stage with an lm_head ends with the last of %u blocks, not with block %u",
             n_blocks, params.last - 1);
    }
    if (params.first < model.first || params.last > model.last) {
        fail(DIM_INVALID_ARGUMENT, "blocks %u..%u: this slice holds the blocks %u..%u", params.first, params.last - 1,
             model.first, model.last - 1);
    }
}

dim_status dim_stage_create(dim_model * model, const dim_stage_params * params, dim_stage ** out) {
    return guarded([&] {
        initialize();
        if (model->planned) fail(DIM_INVALID_ARGUMENT, "a plan's model has no weights");
        check_range(*model, *params);
        check_decoder(*model->llama);
        const block_range range{ params->first, params->last, params->takes_tokens, params->has_lm_head };
        std::unique_ptr<dim_stage> stage(
            new dim_stage(make_stage_context(*model->llama, params->context, range), *model, *params));
        stage->prepare();
        *out = stage.release();
    });
}

void dim_stage_free(dim_stage * stage) {
    guarded([&] {
        delete stage;
        give_memory_back();
    });
}

dim_status dim_stage_describe(const dim_stage * stage, dim_context_info * out) {
    return guarded([&] {
        *out = describe(*stage->made.context);
        out->kv_bytes = stage->made.memory->bytes();
    });
}

dim_status dim_stage_crossing(const dim_stage * stage, dim_end end, dim_crossing * out, size_t capacity, size_t * n) {
    return guarded([&] { give_crossing(end == DIM_END_IN ? stage->in : stage->out, out, capacity, n); });
}

bool dim_stage_reads_tokens(const dim_stage * stage) { return stage->reads_tokens && !stage->range.takes_tokens; }

dim_status dim_stage_evaluate(dim_stage * stage, const dim_row * rows, size_t n_rows, const int32_t * tokens,
                              dim_dtype input_type, const void * input, size_t input_len, dim_dtype output_type,
                              void * output, size_t output_len, size_t * n_written, dim_fault * fault) {
    return guarded(fault, [&] {
        stage->evaluate({ rows, n_rows, tokens, input_type, input, input_len, output_type, output, output_len },
                        n_written);
    });
}

dim_status dim_stage_rewind(dim_stage * stage, uint32_t session, uint32_t position, dim_fault * fault) {
    return guarded(fault, [&] { stage->session.rewind(stage->made.memory->module(), session, position); });
}

dim_status dim_stage_lowest(const dim_stage * stage, uint32_t session, uint32_t * position, bool * lost,
                            dim_fault * fault) {
    return guarded(fault, [&] {
        *position = stage->session.lowest(session);
        *lost = stage->session.is_lost(session);
    });
}

uint32_t dim_stage_snapshots(const dim_stage * stage) { return stage->made.memory->n_snapshots(); }

dim_status dim_stage_length(const dim_stage * stage, uint32_t session, uint32_t * length, dim_fault * fault) {
    return guarded(fault, [&] { *length = stage->session.length(session); });
}

void dim_stage_graphs(const dim_stage * stage, uint64_t * reused, uint64_t * built) {
    *reused = stage->n_reused;
    *built = stage->n_built;
}

dim_status dim_stage_watch(dim_stage * stage, bool on) {
    return guarded([&] { stage->watch(on); });
}

dim_status dim_stage_block_stats(const dim_stage * stage, dim_block_stats * out, size_t capacity, size_t * n) {
    return guarded([&] {
        if (capacity < stage->stats.size())
            fail(DIM_WRONG_SIZE, "room for %zu blocks of %zu", capacity, stage->stats.size());
        std::copy(stage->stats.begin(), stage->stats.end(), out);
        *n = stage->stats.size();
    });
}
