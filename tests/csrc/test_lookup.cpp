// Guesses of what comes next, against the definition in so many words.

#include <algorithm>
#include <random>
#include <vector>

#include "check.h"
#include "engine/lookup.h"

using namespace batchinfer;

namespace {

using Tokens = std::vector<int32_t>;

Tokens guess(const Tokens& tokens, int32_t count) {
    Tokens draft{99};  // left over from another sequence
    look_up(tokens, count, draft);
    return draft;
}

// How many tokens before and at `end` are those before and at the last one; 8 at most.
int32_t agreement(const Tokens& tokens, int32_t end) {
    int32_t agree = 0;
    const auto last = static_cast<int32_t>(tokens.size()) - 1;
    while (agree < 8 && agree <= end && tokens[end - agree] == tokens[last - agree])
        ++agree;
    return agree;
}

Tokens expected(Tokens tokens, int32_t count) {
    int32_t best = -1, longest = 1;
    for (int32_t end = 0; end < static_cast<int32_t>(tokens.size()) - 1; ++end) {
        const int32_t agree = agreement(tokens, end);
        if (agree > 1 && agree >= longest) {
            best = end;
            longest = agree;
        }
    }
    Tokens draft;
    for (int32_t i = 1; best >= 0 && i <= count; ++i) {
        draft.push_back(tokens[best + i]);
        tokens.push_back(draft.back());
    }
    return draft;
}

void test_cases() {
    CHECK(guess({}, 4).empty());
    CHECK(guess({1}, 4).empty());
    CHECK(guess({1, 1}, 4).empty());
    CHECK(guess({1, 2, 3, 1}, 4).empty());  // one token is too little
    CHECK(guess({1, 2, 3, 4, 1, 2}, 2) == (Tokens{3, 4}));
    CHECK(guess({1, 2, 3, 4, 1, 2}, 0).empty());
    CHECK(guess({0, 1, 2, 3, 9, 1, 2, 4, 0, 1, 2}, 1) == (Tokens{3}));  // the longer agreement, not the later place
    CHECK(guess({1, 2, 3, 1, 2, 4, 1, 2}, 1) == (Tokens{4}));           // the later of two alike
    CHECK(guess({5, 7, 7, 7}, 3) == (Tokens{7, 7, 7}));                 // the text repeats itself
    CHECK(guess({1, 2, 3, 1, 2, 3}, 5) == (Tokens{1, 2, 3, 1, 2}));
}

void test_random() {
    std::mt19937 random(1);
    for (int round = 0; round < 2000; ++round) {
        Tokens tokens(random() % 40);
        const uint32_t vocabulary = 1 + random() % 4;
        std::ranges::generate(tokens, [&] { return static_cast<int32_t>(random() % vocabulary); });
        const auto count = static_cast<int32_t>(random() % 12);
        CHECK(guess(tokens, count) == expected(tokens, count));
    }
}

}  // namespace

int main() {
    test_cases();
    test_random();
}
