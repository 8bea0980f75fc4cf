// The forecast against a count of every page in every step.

#include <algorithm>
#include <map>
#include <random>
#include <set>
#include <vector>

#include "check.h"
#include "engine/admission.h"

using namespace batchinfer;

namespace {

constexpr int32_t kPageSize = 4;
constexpr int32_t kNumPages = 40;
constexpr int64_t kHorizon = 64;

struct Holder {
    std::vector<PageId> held;
    Lifetime life;
};

/// Pages a sequence has in `step`, by the definition of Lifetime.
int64_t pages_at(const Lifetime& life, int64_t step) {
    if (step > life.last) return 0;
    const int64_t grown = (std::max<int64_t>(step - life.origin, 0) + kPageSize - 1) / kPageSize;
    return std::clamp<int64_t>(grown, life.min_pages, life.max_pages);
}

class Brute {
  public:
    std::map<int32_t, Holder> holders;
    std::map<PageId, int64_t> until;  // of held pages: the farthest `last` of any holder since it was last unheld

    int64_t use(int64_t step) const {
        int64_t use = 0;
        for (const auto& [page, last] : until)
            use += step <= last;
        for (const auto& [id, holder] : holders) {
            use += std::max<int64_t>(pages_at(holder.life, step) - std::ssize(holder.held), 0);
        }
        return use;
    }
    bool fits(const Holder& candidate, int64_t now, int64_t limit) const {
        for (int64_t step = now; step <= candidate.life.last; ++step) {
            int64_t more = std::max<int64_t>(pages_at(candidate.life, step) - std::ssize(candidate.held), 0);
            for (const PageId page : candidate.held)
                more += !until.contains(page) || until.at(page) < step;
            if (use(step) + more > limit) return false;
        }
        return true;
    }
    void hold(const Holder& holder) {
        for (const PageId page : holder.held)
            until[page] = std::max(until[page], holder.life.last);
    }
};

/// Sequences come (some sharing pages of others), take pages as announced, and go, some of them early.
void random_life(uint32_t seed) {
    std::mt19937 random(seed);
    const auto below = [&](int32_t n) { return static_cast<int32_t>(random() % n); };
    PageForecast forecast(kNumPages, kPageSize, kHorizon);
    Brute brute;
    std::set<PageId> unheld;
    for (PageId page = 0; page < kNumPages; ++page)
        unheld.insert(page);
    const auto leave = [&](std::map<int32_t, Holder>::iterator it) {
        const Holder holder = it->second;
        brute.holders.erase(it);
        std::vector<PageId> dropped;
        for (const PageId page : holder.held) {
            const bool shared = std::ranges::any_of(brute.holders, [&](const auto& other) {
                return std::ranges::find(other.second.held, page) != other.second.held.end();
            });
            if (!shared) {
                dropped.push_back(page);
                brute.until.erase(page);
                unheld.insert(page);
            }
        }
        forecast.release(dropped);
        forecast.cancel_growth(static_cast<int32_t>(holder.held.size()), holder.life);
    };

    int32_t next_id = 0;
    int admitted = 0;
    int refused = 0;
    for (int round = 0; round < 300; ++round) {
        for (auto it = brute.holders.begin(); it != brute.holders.end();) {
            auto& [id, holder] = *it;
            if (holder.life.last < forecast.now() || below(40) == 0) {
                leave(it++);
                continue;
            }
            while (std::ssize(holder.held) < pages_at(holder.life, forecast.now()) && !unheld.empty()) {
                const PageId page = *unheld.begin();
                unheld.erase(unheld.begin());
                forecast.take(page, holder.life);
                holder.held.push_back(page);
                brute.until[page] = holder.life.last;
            }
            ++it;
        }
        if (below(2) == 0) {
            Holder candidate;
            if (!brute.holders.empty() && below(2) == 0) {  // the first pages of another
                const auto& other = std::next(brute.holders.begin(), below(brute.holders.size()))->second;
                candidate.held.assign(other.held.begin(), other.held.begin() + below(other.held.size() + 1));
            }
            const int32_t length = static_cast<int32_t>(candidate.held.size()) * kPageSize + 1 + below(12);
            const int32_t more = below(40);
            const int64_t delay = below(4);
            candidate.life = {.origin = forecast.now() - length,
                              .last = std::min(forecast.now() + more + delay, forecast.farthest()),
                              .min_pages = (length + kPageSize - 1) / kPageSize,
                              .max_pages = (length + more + kPageSize - 1) / kPageSize};
            const bool fits = forecast.fits(candidate.held, candidate.life, kNumPages);
            CHECK(fits == brute.fits(candidate, forecast.now(), kNumPages));
            (fits ? admitted : refused) += 1;
            if (fits) {
                forecast.add(candidate.held, candidate.life);
                brute.hold(candidate);
                for (const PageId page : candidate.held)
                    unheld.erase(page);
                brute.holders.emplace(next_id++, candidate);
            }
        }
        for (int64_t step = forecast.now(); step <= forecast.farthest(); ++step) {
            CHECK(forecast.use(step) == brute.use(step));
        }
        forecast.advance();
    }
    CHECK(admitted > 20 && refused > 5);
    while (!brute.holders.empty())
        leave(brute.holders.begin());
    for (int64_t step = forecast.now(); step <= forecast.farthest(); ++step)
        CHECK(forecast.use(step) == 0);
}

/// Two sequences of 8 pages at their ends fit into 12 pages if one ends before the other has grown.
void staggered_ends_fit_where_the_sum_does_not() {
    PageForecast forecast(12, kPageSize, kHorizon);
    const Lifetime old{.origin = -30, .last = 2, .min_pages = 8, .max_pages = 8};
    const Lifetime young{.origin = -4, .last = 28, .min_pages = 1, .max_pages = 8};
    forecast.add({}, old);
    CHECK(forecast.use(0) == 8 && forecast.use(2) == 8 && forecast.use(3) == 0);
    CHECK(forecast.fits({}, young, 12));
    const Lifetime long_lived{.origin = -30, .last = 25, .min_pages = 8, .max_pages = 8};
    CHECK(forecast.fits({}, long_lived, 16) && !forecast.fits({}, long_lived, 15));
}

}  // namespace

int main() {
    for (uint32_t seed = 0; seed < 20; ++seed)
        random_life(seed);
    staggered_ends_fit_where_the_sum_does_not();
}
