// Structures and enumerations that _abi.py declares as well. MIRRORED keeps the text of a declaration, which is
// compared with _abi.py when the library is opened, so that a library of other sources is refused.
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
