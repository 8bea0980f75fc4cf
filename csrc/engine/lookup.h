#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace batchinfer {

/// Guesses the `count` tokens that come after `tokens`: those that came after the latest of the earlier places that
/// agree with the end of `tokens` for longest. `draft` is left empty where fewer than two tokens agree. A place so near
/// the end that its own continuation is part of the guess goes on with the guess: a text that repeats itself.
///
/// Prompt lookup decoding (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding). One pass over the
/// tokens: about 1 us for 4,000 of them.
void look_up(std::span<const int32_t> tokens, int32_t count, std::vector<int32_t>& draft);

}  // namespace batchinfer
