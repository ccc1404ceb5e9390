// Structures and enumerations that _native.py declares as well. MIRRORED keeps the text of a declaration, which is
// compared with _native.py when the library is opened, so that a library of other sources is refused.
#pragma once

#define MIRRORED(keyword, name, ...) \
  keyword name __VA_ARGS__;          \
  constexpr Declaration name##_ABI = {#keyword " " #name " " #__VA_ARGS__, sizeof(name)}

namespace {

struct Declaration {
  const char* text;
  long size;
};

}  // namespace
