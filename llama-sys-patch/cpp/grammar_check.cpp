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
// Bytes of names that llama.cpp makes up for brackets and repetitions: each has all of its rule's.
constexpr uint64_t MOST_NAME_BYTES = 1u << 25;
// Ways to begin with a rule: llama.cpp's search for left recursion walks them all.
constexpr uint64_t MOST_BEGINNINGS = 1u << 22;
// Levels of rules within rules that all ways on from one place have together, 8 bytes each: those included that come to
// nothing.
constexpr uint64_t MOST_LEVELS = 1u << 22;
// Each way is compared with each other one, level by level.
constexpr uint64_t MOST_COMPARED = 1u << 28;

// More often is as often as one likes (llama-grammar.cpp, MAX_REPETITION_THRESHOLD).
constexpr uint64_t AS_GOOD_AS_ENDLESS = 2000;

// How often something is repeated.
struct repetition {
    uint64_t least, most;
};

const char * skip_blanks(const char * at) {
    for (;;) {
        at += std::strspn(at, " \t\r\n");
        if (*at != '#') return at;
        at += std::strcspn(at, "\r\n");
    }
}

static bool is_of_a_name(char c) { return std::isalnum((unsigned char) c) || c == '-'; }

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

// What llama.cpp makes of a grammar beyond what stands in it.
struct made {
    uint64_t elements = 0, name_bytes = 0;

    void add(uint64_t more, uint64_t names, uint64_t bytes_each) {
        elements += more;
        name_bytes += names * bytes_each;
        if (elements > MOST_ELEMENTS)
            fail(DIM_REFUSED, "its repetitions make more than %llu elements of it", (unsigned long long) MOST_ELEMENTS);
        if (name_bytes > MOST_NAME_BYTES)
            fail(DIM_REFUSED, "there are too many brackets and repetitions in a rule with a name of %llu bytes",
                 (unsigned long long) bytes_each);
    }
};

void check_repetitions(const char * gbnf) {
    // elements of the item before a repetition; bytes of the last word, and of the name of the rule
    uint64_t length = 1, word = 0, name = 0;
    made all;
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
            default:
                length = 1;
                if (*at == ':') name = word;
                if (*at == '(') all.add(0, 1, name);
                if (is_of_a_name(*at)) {
                    const char * begin = at;
                    while (is_of_a_name(at[1])) at++;
                    word = (uint64_t) (at - begin) + 1;
                }
                continue;
        }
        all.add(length * std::max<uint64_t>(times.most, 1), times.most - times.least, name);
        length = times.least == 0 ? 1 : length * times.least + 1;
    }
}

namespace {

using rules = llama_grammar_rules;

bool ends(const llama_grammar_element & element) {
    return element.type == LLAMA_GRETYPE_END || element.type == LLAMA_GRETYPE_ALT;
}

// An alternative of a rule, as far as it may be nothing.
struct alternative {
    uint32_t rule;
    size_t n_open = 0;       // references to rules of which it is not known that they may be nothing
    bool has_sign = false;   // it has something else, so it may not
};

// Which rules may be nothing.
std::vector<bool> may_be_empty(const rules & all) {
    std::vector<alternative> alternatives;
    std::vector<std::vector<size_t>> speak_of(all.size());   // alternatives, as often as they do
    for (uint32_t i = 0; i < all.size(); i++) {
        alternatives.push_back({ i });
        for (const auto & element : all[i]) {
            auto & last = alternatives.back();
            if (element.type == LLAMA_GRETYPE_ALT) {
                alternatives.push_back({ i });
            } else if (element.type == LLAMA_GRETYPE_RULE_REF) {
                last.n_open++;
                speak_of[element.value].push_back(alternatives.size() - 1);
            } else if (element.type != LLAMA_GRETYPE_END) {
                last.has_sign = true;
            }
        }
    }
    std::vector<bool> empty(all.size(), false);
    std::vector<uint32_t> found;
    const auto look_at = [&](const alternative & one) {
        if (one.has_sign || one.n_open > 0 || empty[one.rule]) return;
        empty[one.rule] = true;
        found.push_back(one.rule);
    };
    for (const auto & one : alternatives) look_at(one);
    while (!found.empty()) {
        const auto rule = found.back();
        found.pop_back();
        for (const auto at : speak_of[rule]) {
            alternatives[at].n_open--;
            look_at(alternatives[at]);
        }
    }
    return empty;
}

// What llama.cpp makes of a place in a grammar: the ways on from there, each a stack of rules within rules.
struct ways_on {
    uint64_t ways = 0, stacks = 0, levels = 0;   // `stacks`: also those that come to nothing; `levels`: of all

    void add(const ways_on & more, uint64_t levels_below) {
        const uint64_t most = MOST_LEVELS + 1;
        ways = std::min(ways + more.ways, most);
        levels = std::min(levels + more.levels + more.stacks * levels_below, most);
        stacks = std::min(stacks + more.stacks, most);
    }
    bool are_too_many() const { return levels > MOST_LEVELS || ways * levels > MOST_COMPARED; }
};

// The ways on from an element, where there are `behind` on from the next one.
ways_on ways_from(const llama_grammar_element * at, const std::vector<ways_on> & of_rules,
                  const std::vector<bool> & empty, const ways_on & behind) {
    if (at->type != LLAMA_GRETYPE_RULE_REF) return { 1, 1, 1 };
    ways_on all{ 0, 1, 1 };
    all.add(of_rules[at->value], ends(at[1]) ? 0 : 1);
    if (empty[at->value]) all.add(behind, 0);
    return all;
}

// Those at the beginning of a rule, where those of all that it begins with are known.
ways_on ways_into(const llama_grammar_rule & rule, const std::vector<ways_on> & of_rules,
                  const std::vector<bool> & empty) {
    ways_on all, behind{ 0, 1, 0 };
    for (size_t i = rule.size() - 1; i-- > 0;) {
        if (ends(rule[i])) {
            all.add(behind, 0);
            behind = { 0, 1, 0 };
        } else {
            behind = ways_from(&rule[i], of_rules, empty, behind);
        }
    }
    all.add(behind, 0);
    return all;
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
    std::vector<std::vector<uint32_t>> rules;

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
                rules.emplace_back();
                do {
                    rules.back().push_back(path.back());
                    of[path.back()] = (uint32_t) rules.size() - 1;
                    path.pop_back();
                } while (rules.back().back() != rule);
            }
            frames.pop_back();
            if (!frames.empty()) {
                auto & before = low[frames.back().rule];
                before = std::min(before, low[rule]);
            }
        }
    }
};

// For each circle, in how many ways its rules begin, out of it and on.
std::vector<uint64_t> count_beginnings(const graph & next, const circles & circle) {
    std::vector<uint64_t> found(circle.rules.size(), 1);
    for (uint32_t c = 0; c < circle.rules.size(); c++) {
        for (const auto rule : circle.rules[c]) {
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

// That llama.cpp's own search for left recursion comes to an end: it refuses the same rules that are refused here.
static void check_search(const llama_grammar_parser & parser) {
    const auto next = beginnings_of(parser.rules, has_empty_alternative(parser.rules));
    const circles circle(next);
    for (uint32_t i = 0; i < next.size(); i++) {
        for (const auto & to : next[i])
            if (circle.of[to.rule] == circle.of[i]) refuse_recursion(parser, i);
    }
    const auto beginnings = count_beginnings(next, circle);
    // from each rule that it has not come to yet, but through what it has
    std::vector<bool> visited(next.size(), false);
    uint64_t n_steps = 0;
    for (uint32_t i = 0; i < next.size(); i++) {
        if (visited[i]) continue;
        n_steps += beginnings[circle.of[i]];
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
            for (const auto & to : next[rule]) to_visit.push_back(to.rule);
        }
    }
}

// What follows a sign within a rule is begun like a rule of its own.
static void check_ways_within(const llama_grammar_parser & parser, uint32_t rule, const std::vector<ways_on> & of_rules,
                              const std::vector<bool> & empty) {
    const auto check = [&](const ways_on & ways) {
        if (ways.are_too_many()) {
            fail(DIM_REFUSED, "a text may go on in too many ways at once, in the rule \"%s\"",
                 name_of(parser, rule).c_str());
        }
    };
    check(of_rules[rule]);
    const auto & elements = parser.rules[rule];
    ways_on behind{ 0, 1, 0 };
    for (size_t i = elements.size(); i-- > 0;) {
        behind = ends(elements[i]) ? ways_on{ 0, 1, 0 } : ways_from(&elements[i], of_rules, empty, behind);
        check(behind);
    }
}

// That its stacks are not too many. One that comes round with a rest grows for ever; one that comes round without is the same
// again, which is seen: (a*)* is fine, and of such a circle all rules have the ways of all.
static void check_stacks(const llama_grammar_parser & parser) {
    const auto & all = parser.rules;
    const auto empty = may_be_empty(all);
    const auto next = beginnings_of(all, empty);
    const circles circle(next);
    for (uint32_t i = 0; i < next.size(); i++) {
        for (const auto & to : next[i])
            if (to.leaves_rest && circle.of[to.rule] == circle.of[i]) refuse_recursion(parser, i);
    }
    std::vector<ways_on> of_rules(all.size());
    for (const auto & members : circle.rules) {
        ways_on together;
        for (const auto rule : members) together.add(ways_into(all[rule], of_rules, empty), 0);
        for (const auto rule : members) of_rules[rule] = together;
    }
    for (uint32_t i = 0; i < all.size(); i++) check_ways_within(parser, i, of_rules, empty);
}

void check_beginnings(const llama_grammar_parser & parser) {
    check_search(parser);
    check_stacks(parser);
}

}   // namespace dim
