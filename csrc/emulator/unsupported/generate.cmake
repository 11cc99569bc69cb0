# SPDX-License-Identifier: Apache-2.0
#
# Writes OUTPUT, a C++ file that defines every symbol of LIBRARY in SYMBOLS (symbols.txt, which says what the kinds
# mean). A library with none gets a file that defines nothing.
#
#   cmake -D SYMBOLS=symbols.txt -D LIBRARY=atb -D OUTPUT=atb.cpp -P generate.cmake

set(source "#include \"unsupported/refuse.h\"\n\nusing namespace ascend_emulator;\n\nextern \"C\" {\n")
file(STRINGS ${SYMBOLS} lines REGEX "^[^#]")
foreach(line IN LISTS lines)
  if(NOT line MATCHES "^([a-z_]+) +([a-z]+) +([A-Za-z0-9_]+)$")
    message(FATAL_ERROR "${SYMBOLS} has the line '${line}'; write library, kind and symbol")
  endif()
  set(library ${CMAKE_MATCH_1})
  set(kind ${CMAKE_MATCH_2})
  set(symbol ${CMAKE_MATCH_3})
  if(NOT library STREQUAL LIBRARY)
    continue()
  endif()
  if(kind STREQUAL "status")
    string(APPEND source "int ${symbol}() { return Refuse(\"${symbol}\"); }\n")
  elseif(kind STREQUAL "null")
    string(APPEND source "void* ${symbol}() {\n  Refuse(\"${symbol}\");\n  return nullptr;\n}\n")
  elseif(kind STREQUAL "undefined")
    string(APPEND source "int ${symbol}() {\n  Refuse(\"${symbol}\");\n  return -1;\n}\n")
  elseif(kind STREQUAL "nothing")
    string(APPEND source "void ${symbol}() { Refuse(\"${symbol}\"); }\n")
  elseif(kind STREQUAL "fatal")
    string(APPEND source "void ${symbol}() { RefuseAndAbort(\"${symbol}\"); }\n")
  else()
    message(FATAL_ERROR "${SYMBOLS} gives ${symbol} the kind '${kind}'; use status, null, undefined, nothing or fatal")
  endif()
endforeach()
string(APPEND source "}  // extern \"C\"\n")
file(WRITE ${OUTPUT} "${source}")
