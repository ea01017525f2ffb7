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
// Ways to begin with a rule: llama.cpp's search for left recursion walks them all.
constexpr uint64_t MOST_BEGINNINGS = 1u << 22;

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

// What rules a rule may begin with, as often as it may.
std::vector<uint32_t> begins_with(const llama_grammar_rule & rule, const std::vector<bool> & empty) {
    std::vector<uint32_t> found;
    bool at_beginning = true;
    for (const auto & element : rule) {
        if (ends(element)) {
            at_beginning = true;
        } else if (at_beginning && element.type == LLAMA_GRETYPE_RULE_REF) {
            found.push_back(element.value);
            at_beginning = empty[element.value];
        } else {
            at_beginning = false;
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

// A rule that may begin with itself, where those that are no longer `open` do not, and each of the others begins with one that
// is.
static size_t begins_with_itself(const std::vector<std::vector<uint32_t>> & next, const std::vector<bool> & open) {
    std::vector<bool> passed(next.size(), false);
    size_t at = (size_t) (std::find(open.begin(), open.end(), true) - open.begin());
    while (!passed[at]) {
        passed[at] = true;
        at = *std::find_if(next[at].begin(), next[at].end(), [&](uint32_t to) { return open[to]; });
    }
    return at;
}

void check_beginnings(const llama_grammar_parser & parser) {
    const auto & all = parser.rules;
    const auto empty = may_be_empty(all);
    std::vector<std::vector<uint32_t>> next(all.size()), before(all.size());
    std::vector<size_t> n_open(all.size());
    std::vector<uint32_t> closed;   // each behind all that it begins with
    for (uint32_t i = 0; i < all.size(); i++) {
        next[i] = begins_with(all[i], empty);
        for (const auto to : next[i]) before[to].push_back(i);
        n_open[i] = next[i].size();
        if (n_open[i] == 0) closed.push_back(i);
    }
    std::vector<uint64_t> beginnings(all.size(), 1);
    std::vector<bool> open(all.size(), true);
    for (size_t i = 0; i < closed.size(); i++) {
        const auto rule = closed[i];
        open[rule] = false;
        for (const auto to : next[rule])
            beginnings[rule] = std::min(beginnings[rule] + beginnings[to], MOST_BEGINNINGS + 1);
        for (const auto from : before[rule]) {
            if (--n_open[from] == 0) closed.push_back(from);
        }
    }
    if (closed.size() < all.size()) {
        const auto rule = begins_with_itself(next, open);
        fail(DIM_REFUSED, "left recursion: the rule \"%s\" may begin with itself", name_of(parser, rule).c_str());
    }
    // as that search goes: from each rule that it has not come to yet, but through what it has
    std::vector<bool> visited(all.size(), false);
    uint64_t n_steps = 0;
    for (uint32_t i = 0; i < all.size(); i++) {
        if (visited[i]) continue;
        n_steps += beginnings[i];
        if (n_steps > MOST_BEGINNINGS) {
            fail(DIM_REFUSED, "there are more than %llu ways to begin, with the rule \"%s\" and those before it",
                 (unsigned long long) MOST_BEGINNINGS, name_of(parser, i).c_str());
        }
        std::vector<uint32_t> to_visit{ i };
        while (!to_visit.empty()) {
            const auto rule = to_visit.back();
            to_visit.pop_back();
            if (visited[rule]) continue;
            visited[rule] = true;
            to_visit.insert(to_visit.end(), next[rule].begin(), next[rule].end());
        }
    }
}

}   // namespace dim
