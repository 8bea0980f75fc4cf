#pragma once

#include <cstdio>
#include <cstdlib>

/// An assertion that every build type keeps.
#define CHECK(condition)                                                                   \
    do {                                                                                   \
        if (!(condition)) {                                                                \
            std::fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
            std::exit(1);                                                                  \
        }                                                                                  \
    } while (false)

/// The expression must throw `exception`.
#define CHECK_THROWS(expression, exception)                                                               \
    do {                                                                                                  \
        bool thrown = false;                                                                              \
        try {                                                                                             \
            expression;                                                                                   \
        } catch (const exception&) {                                                                      \
            thrown = true;                                                                                \
        }                                                                                                 \
        if (!thrown) {                                                                                    \
            std::fprintf(stderr, "%s:%d: no %s from: %s\n", __FILE__, __LINE__, #exception, #expression); \
            std::exit(1);                                                                                 \
        }                                                                                                 \
    } while (false)
