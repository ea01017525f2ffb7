#include "grammar_check.h"

#include "boundary.h"

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace dim {

// Elements that repetitions may make of a grammar, 8 bytes each.
constexpr uint64_t MOST_ELEMENTS = 1u << 20;
// Ways to begin with a rule: llama.cpp's search for left recursion walks them all, and its stacks are as many.
constexpr uint64_t MOST_BEGINNINGS = 1u << 20;

// More often is as often as one likes (llama-grammar.cpp, MAX_REPETITION_THRESHOLD).
constexpr uint64_t AS_GOOD_AS_ENDLESS = 2000;

// How often something is repeated.
struct repetition {
    uint64_t least, most;
};

static const char * skip_blanks(const char * at) { return at + std::strspn(at, " \t\r\n"); }

// A number; one of more than 9 digits is more than anything is repeated.
static const char * read_number(const char * at, uint64_t & number) {
    number = 0;
    for (; std::isdigit((unsigned char) *at); at++)
        number = std::min<uint64_t>(number * 10 + (uint64_t) (*at - '0'), 1'000'000'000);
    return at;
}

// `at` stands behind a {. What is not well formed is left to the parser.
static const char * read_repetition(const char * at, repetition & found) {
    at = skip_blanks(read_number(skip_blanks(at), found.least));
    found.most = found.least;
    if (*at != ',') return at;
    at = skip_blanks(at + 1);
    if (!std::isdigit((unsigned char) *at)) {
        found.most++;
        return at;
    }
    at = read_number(at, found.most);
    if (found.most > AS_GOOD_AS_ENDLESS) found.most = found.least + 1;
    if (found.most < found.least) {
        fail(DIM_REFUSED, "{%llu,%llu}: it is repeated at least more often than at most",
             (unsigned long long) found.least, (unsigned long long) found.most);
    }
    return at;
}

// Behind what begins at `at` and ends with `end`; at the text's end if it doesn't.
static const char * skip_to(const char * at, char end) {
    for (at++; *at && *at != end; at++) {
        if (*at == '\\' && at[1]) at++;
    }
    return at;
}

void check_repetitions(const char * gbnf) {
    // elements of the item before a repetition, and what all of them have made
    uint64_t length = 1, made = 0;
    for (const char * at = gbnf; *at; at += *at != 0) {
        repetition times{};
        switch (*at) {
            case '#': at += std::strcspn(at, "\r\n"); continue;
            case '<':
                at += std::strcspn(at, ">");
                length = 1;
                continue;
            case '"':
            case '[': {
                const char * begin = at;
                at = skip_to(at, *at == '"' ? '"' : ']');
                length = (uint64_t) (at - begin);
                continue;
            }
            case '{':  at = read_repetition(at + 1, times); break;
            case '+':  times = { 1, 2 }; break;
            case '*':
            case '?':  times = { 0, 1 }; break;
            case ' ':
            case '\t':
            case '\r':
            case '\n':
            case '}':  continue;
            default:   length = 1; continue;
        }
        made += length * std::max<uint64_t>(times.most, 1);
        if (made > MOST_ELEMENTS)
            fail(DIM_REFUSED, "its repetitions make more than %llu elements of it", (unsigned long long) MOST_ELEMENTS);
        length = times.least == 0 ? 1 : length * times.least + 1;
    }
}

namespace {

using rules = llama_grammar_rules;

bool ends(const llama_grammar_element & element) {
    return element.type == LLAMA_GRETYPE_END || element.type == LLAMA_GRETYPE_ALT;
}

// Which rules may be nothing.
std::vector<bool> may_be_empty(const rules & all) {
    std::vector<bool> empty(all.size(), false);
    for (bool has_changed = true; has_changed;) {
        has_changed = false;
        for (size_t i = 0; i < all.size(); i++) {
            if (empty[i]) continue;
            bool is_empty = true;   // of an alternative, so far
            for (const auto & element : all[i]) {
                if (!ends(element)) {
                    is_empty = is_empty && element.type == LLAMA_GRETYPE_RULE_REF && empty[element.value];
                    continue;
                }
                if (is_empty) {
                    empty[i] = has_changed = true;
                    break;
                }
                is_empty = true;
            }
        }
    }
    return empty;
}

// Which rules may be nothing, as far as llama.cpp's search for left recursion sees.
std::vector<bool> has_empty_alternative(const rules & all) {
    std::vector<bool> empty(all.size(), false);
    for (size_t i = 0; i < all.size(); i++) {
        bool at_beginning = true;
        for (const auto & element : all[i]) {
            if (ends(element) && at_beginning) empty[i] = true;
            at_beginning = ends(element);
        }
    }
    return empty;
}

// A rule with which another may begin.
struct beginning {
    uint32_t rule;
    bool leaves_rest;   // something follows on it
};

using graph = std::vector<std::vector<beginning>>;

// What each rule may begin with, as often as it may, where these rules may be nothing.
graph beginnings_of(const rules & all, const std::vector<bool> & empty) {
    graph next(all.size());
    for (size_t i = 0; i < all.size(); i++) {
        bool at_beginning = true;
        for (size_t k = 0; k < all[i].size(); k++) {
            const auto & element = all[i][k];
            if (ends(element)) {
                at_beginning = true;
            } else if (at_beginning && element.type == LLAMA_GRETYPE_RULE_REF) {
                next[i].push_back({ element.value, !ends(all[i][k + 1]) });
                at_beginning = empty[element.value];
            } else {
                at_beginning = false;
            }
        }
    }
    return next;
}

// Which rules may begin with each other, round and round: each one's circle, numbered so that a circle has a higher number
// than those that it begins with. Tarjan's, without recursion.
struct circles {
    std::vector<uint32_t> of;
    uint32_t n = 0;

    explicit circles(const graph & next) : of(next.size(), NONE), low(next.size(), NONE) {
        for (uint32_t i = 0; i < next.size(); i++) {
            if (low[i] == NONE) visit(next, i);
        }
    }

private:
    static constexpr uint32_t NONE = UINT32_MAX;
    std::vector<uint32_t> low, path;
    uint32_t n_seen = 0;

    void visit(const graph & next, uint32_t first) {
        struct frame {
            uint32_t rule, number;
            size_t at;
        };
        std::vector<frame> frames;
        const auto enter = [&](uint32_t rule) {
            frames.push_back({ rule, n_seen, 0 });
            low[rule] = n_seen++;
            path.push_back(rule);
        };
        enter(first);
        while (!frames.empty()) {
            auto & frame = frames.back();
            const auto rule = frame.rule;
            if (frame.at < next[rule].size()) {
                const auto to = next[rule][frame.at++].rule;
                if (low[to] == NONE) {
                    enter(to);
                } else if (of[to] == NONE) {
                    low[rule] = std::min(low[rule], low[to]);
                }
                continue;
            }
            if (low[rule] == frame.number) {
                uint32_t member;
                do {
                    member = path.back();
                    path.pop_back();
                    of[member] = n;
                } while (member != rule);
                n++;
            }
            frames.pop_back();
            if (!frames.empty()) {
                auto & before = low[frames.back().rule];
                before = std::min(before, low[rule]);
            }
        }
    }
};

// For each circle, the ways to begin that lead out of it, and theirs.
std::vector<uint64_t> ways(const graph & next, const circles & circle) {
    std::vector<std::vector<uint32_t>> rules_of(circle.n);
    for (uint32_t i = 0; i < next.size(); i++) rules_of[circle.of[i]].push_back(i);
    std::vector<uint64_t> found(circle.n, 1);
    for (uint32_t c = 0; c < circle.n; c++) {
        for (const auto rule : rules_of[c]) {
            for (const auto & to : next[rule]) {
                if (circle.of[to.rule] != c)
                    found[c] = std::min(found[c] + found[circle.of[to.rule]], MOST_BEGINNINGS + 1);
            }
        }
    }
    return found;
}

std::string name_of(const llama_grammar_parser & parser, size_t rule) {
    for (const auto & [name, id] : parser.symbol_ids) {
        if (id == rule) return name.substr(0, 80);
    }
    return "";
}

}   // namespace

[[noreturn]] static void refuse_recursion(const llama_grammar_parser & parser, size_t rule) {
    fail(DIM_REFUSED, "left recursion: the rule \"%s\" may begin with itself", name_of(parser, rule).c_str());
}

[[noreturn]] static void refuse_ways(const llama_grammar_parser & parser, size_t rule) {
    fail(DIM_REFUSED, "there are more than %llu ways to begin, with the rule \"%s\" and those before it",
         (unsigned long long) MOST_BEGINNINGS, name_of(parser, rule).c_str());
}

// That llama.cpp's own search for left recursion comes to an end: it refuses the same rules that are refused here.
static void check_search(const llama_grammar_parser & parser) {
    const auto next = beginnings_of(parser.rules, has_empty_alternative(parser.rules));
    const circles circle(next);
    for (uint32_t i = 0; i < next.size(); i++) {
        for (const auto & to : next[i])
            if (circle.of[to.rule] == circle.of[i]) refuse_recursion(parser, i);
    }
    const auto found = ways(next, circle);
    // from each rule that it has not come to yet, but through what it has
    std::vector<bool> visited(next.size(), false);
    uint64_t n_steps = 0;
    for (uint32_t i = 0; i < next.size(); i++) {
        if (visited[i]) continue;
        n_steps += found[circle.of[i]];
        if (n_steps > MOST_BEGINNINGS) refuse_ways(parser, i);
        std::vector<uint32_t> to_visit{ i };
        while (!to_visit.empty()) {
            const auto rule = to_visit.back();
            to_visit.pop_back();
            if (visited[rule]) continue;
            visited[rule] = true;
            for (const auto & to : next[rule]) to_visit.push_back(to.rule);
        }
    }
}

// That its stacks do: each way to begin that leaves a rest is one, and one that comes round with a rest grows for ever. One
// that comes round without is the same again, which is seen: (a*)* is fine.
static void check_stacks(const llama_grammar_parser & parser) {
    const auto next = beginnings_of(parser.rules, may_be_empty(parser.rules));
    const circles circle(next);
    for (uint32_t i = 0; i < next.size(); i++) {
        for (const auto & to : next[i])
            if (to.leaves_rest && circle.of[to.rule] == circle.of[i]) refuse_recursion(parser, i);
    }
    const auto found = ways(next, circle);
    for (uint32_t i = 0; i < next.size(); i++)
        if (found[circle.of[i]] > MOST_BEGINNINGS) refuse_ways(parser, i);
}

void check_beginnings(const llama_grammar_parser & parser) {
    check_search(parser);
    check_stacks(parser);
}

}   // namespace dim
