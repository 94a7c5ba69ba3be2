# For wheels: links with the libraries of an older glibc (scripts/wheels.py makes them), so that the symbols that are asked for
# are those it has. Compiler and headers stay this machine's. Included by CMakeLists.txt.

set(PRUNEOPD_GLIBC "" CACHE PATH "Libraries of the glibc to link with; empty: this machine's")
if(PRUNEOPD_GLIBC)
  link_directories(BEFORE "${PRUNEOPD_GLIBC}")
  # Libraries of their own before glibc 2.34; what the script libc.so adds to libc.so.6, of this machine's glibc, otherwise.
  set(CMAKE_CXX_STANDARD_LIBRARIES "-Wl,--as-needed -lpthread -ldl -lrt -lc_nonshared -lc -lld")
  list(APPEND core_sources cmake/single_threaded.cpp)
  # For what shares no exceptions with torch: a libstdc++ of its own, since the machine's has newer symbols, too. What of it is
  # not used could ask for a newer glibc.
  set(own_libstdcxx -static-libstdc++ LINKER:--gc-sections)
endif()
