// Chat templates and answers, by llama.cpp's `common`. JSON goes in and out: what the two sides say to each other changes
// with every model family, and is read on both with a JSON library anyway.
#include "boundary.h"
#include "dialogue.h"
#include "text.h"

#include "chat.h"
#include "json.h"
#include "log.h"

#include <memory>
#include <mutex>
#include <string>
#include <string_view>

using namespace dim;

struct dim_chat_template {
    common_chat_templates_ptr templates;
};

struct dim_chat_parser {
    common_chat_parser_params params;
};

// What `common` logs goes to the terminal, from a thread of its own. What went wrong comes as an exception.
static void be_quiet() {
    static std::once_flag once;
    std::call_once(once, [] { common_log_set_verbosity_thold(-1000); });
}

const char * dim_text_data(const dim_text * text, size_t * length) {
    *length = text->bytes.size();
    return text->bytes.data();
}

void dim_text_free(dim_text * text) { delete text; }

dim_status dim_chat_template_create(const char * source, size_t source_length, const char * bos, const char * eos,
                                    dim_chat_template ** out) {
    return guarded_as(DIM_REFUSED, [&] {
        be_quiet();
        // an empty one is taken from the model there, and there is none
        if (source_length == 0) fail(DIM_REFUSED, "the template is empty");
        auto templates = common_chat_templates_init(nullptr, std::string(source, source_length), bos, eos);
        *out = new dim_chat_template{ std::move(templates) };
    });
}

void dim_chat_template_free(dim_chat_template * chat) {
    guarded([&] { delete chat; });
}

static common_chat_templates_inputs inputs_of(const common_json & request) {
    common_chat_templates_inputs inputs;
    inputs.messages = common_chat_msgs_parse_oaicompat(request.at("messages"));
    if (request.contains("tools")) inputs.tools = common_chat_tools_parse_oaicompat(request.at("tools"));
    inputs.tool_choice = common_chat_tool_choice_parse_oaicompat(request.value("tool_choice", "auto"));
    inputs.parallel_tool_calls = request.value("parallel_tool_calls", false);
    inputs.enable_thinking = request.value("enable_thinking", true);
    inputs.reasoning_format = COMMON_REASONING_FORMAT_DEEPSEEK;   // apart from the content, in a field of its own
    return inputs;
}

// As common_sampler_init() makes patterns of triggers. One that is a token would need the vocabulary: none is made by a
// template.
static std::string pattern_of(const common_grammar_trigger & trigger) {
    const std::string & value = trigger.value;
    switch (trigger.type) {
        case COMMON_GRAMMAR_TRIGGER_TYPE_WORD: {
            std::string escaped;
            for (const char c : value) {
                if (std::string_view(".^$|()*+?[]{}\\").find(c) != std::string_view::npos) escaped += '\\';
                escaped += c;
            }
            return escaped;
        }
        case COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN: return value;
        case COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN_FULL:
            if (value.empty()) return "^$";
            return (value.front() == '^' ? "" : "^") + value + (value.back() == '$' ? "" : "$");
        default: fail(DIM_REFUSED, "the template wants a grammar to begin at a token");
    }
}

dim_status dim_chat_template_apply(const dim_chat_template * chat, const char * request, size_t request_length,
                                   dim_text ** answer) {
    return guarded_as(DIM_REFUSED, [&] {
        const auto inputs = inputs_of(common_json::parse(std::string(request, request_length)));
        const auto params = common_chat_templates_apply(chat->templates.get(), inputs);

        common_json parser = common_json::object();
        parser["format"] = (int) params.format;
        parser["prefill"] = params.generation_prompt;
        parser["rules"] = params.parser;

        common_json triggers = common_json::array();
        if (params.grammar_lazy) {
            for (const auto & trigger : params.grammar_triggers) triggers.push_back(pattern_of(trigger));
        }
        common_json said = common_json::object();
        said["prompt"] = params.prompt;
        said["parser"] = parser.dump();
        said["grammar"] = params.grammar;
        said["grammar_lazy"] = params.grammar_lazy;
        said["triggers"] = triggers;
        said["prefill"] = params.generation_prompt;
        said["preserved"] = params.preserved_tokens;
        said["stops"] = params.additional_stops;
        said["thinks"] = params.supports_thinking;
        const auto can = common_chat_templates_get_caps(chat->templates.get());
        said["takes_tools"] = can.at("supports_tools") || can.at("supports_tool_calls");
        *answer = new dim_text{ said.dump() };
    });
}

dim_status dim_chat_parser_create(const char * saved, size_t saved_length, dim_chat_parser ** out) {
    return guarded_as(DIM_REFUSED, [&] {
        be_quiet();
        const auto parser = common_json::parse(std::string(saved, saved_length));
        auto made = std::make_unique<dim_chat_parser>();
        const int format = parser.at("format").get<int>();
        if (format < 0 || format >= COMMON_CHAT_FORMAT_COUNT) fail(DIM_REFUSED, "there is no format %d", format);
        made->params.format = (common_chat_format) format;
        made->params.generation_prompt = parser.at("prefill").get<std::string>();
        const auto rules = parser.at("rules").get<std::string>();
        if (!rules.empty()) made->params.parser.load(rules);
        *out = made.release();
    });
}

void dim_chat_parser_free(dim_chat_parser * parser) {
    guarded([&] { delete parser; });
}

dim_status dim_chat_parser_parse(const dim_chat_parser * parser, const char * answer, size_t answer_length,
                                 bool partial, dim_text ** message) {
    return guarded_as(DIM_REFUSED, [&] {
        const auto parsed = common_chat_parse(std::string(answer, answer_length), partial, parser->params);
        common_json calls = common_json::array();
        for (const auto & call : parsed.tool_calls) {
            calls.push_back({ { "name", call.name }, { "arguments", call.arguments }, { "id", call.id } });
        }
        common_json said = common_json::object();
        said["content"] = parsed.render_content("");
        said["reasoning_content"] = parsed.reasoning_content;
        said["tool_calls"] = calls;
        // an answer that is not complete may end within a character
        *message = new dim_text{ said.dump_safe() };
    });
}
