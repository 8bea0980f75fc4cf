#include "engine/lookup.h"

namespace batchinfer {
namespace {

constexpr int32_t kShortest = 2;  // a single token agrees nearly everywhere, and foretells little
constexpr int32_t kLongest = 8;   // agreement beyond this makes a guess no better

}  // namespace

void look_up(std::span<const int32_t> tokens, int32_t count, std::vector<int32_t>& draft) {
    draft.clear();
    const auto size = static_cast<int32_t>(tokens.size());
    int32_t longest = kShortest - 1, place = size;
    for (int32_t end = size - 2; end + 1 >= kShortest && longest < kLongest; --end) {
        int32_t agree = 0;
        while (agree < kLongest && agree <= end && tokens[end - agree] == tokens[size - 1 - agree])
            ++agree;
        if (agree > longest) {
            longest = agree;
            place = end + 1;
        }
    }
    if (place == size) return;
    for (int32_t i = 0; i < count; ++i)
        draft.push_back(place + i < size ? tokens[place + i] : draft[place + i - size]);
}

}  // namespace batchinfer
