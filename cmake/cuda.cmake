# pruneopd_kernels/_cuda.so: the operators for torch on NVIDIA GPUs, where there is a CUDA toolkit. Included by CMakeLists.txt.
#
# nvcc is called as it is and not through CMake's CUDA language, which compiles trial programs for architectures that a new
# toolkit may have dropped, and does not look again where it once found no compiler.

set(PRUNEOPD_CUDA AUTO CACHE STRING "Build for NVIDIA GPUs: AUTO (where nvcc is found), ON (or fail) or OFF")
set(PRUNEOPD_CUDA_ARCHITECTURES "" CACHE STRING "Compute capabilities to compile for, as 80;90; empty: 80;90;120;100")

unset(why_not)  # what is missing, if anything is, and what would help
if(PRUNEOPD_CUDA STREQUAL "OFF")
  set(why_not "PRUNEOPD_CUDA is OFF")
else()
  find_package(CUDAToolkit QUIET)
  if(NOT CUDAToolkit_NVCC_EXECUTABLE)
    set(why_not "there is no nvcc; install a CUDA toolkit, 12 or newer, or name its folder in CUDA_HOME")
  elseif(CUDAToolkit_VERSION VERSION_LESS 12)
    set(why_not "${CUDAToolkit_NVCC_EXECUTABLE} is of CUDA ${CUDAToolkit_VERSION}; C++20 needs 12 or newer")
  elseif(NOT TARGET CUDA::cudart_static)
    set(why_not "the toolkit of ${CUDAToolkit_NVCC_EXECUTABLE} has no libcudart_static.a; install the whole of it")
  endif()
endif()
set(without_cuda "${CMAKE_BINARY_DIR}/without_cuda.txt")  # for setup.py, which tells the user
file(REMOVE "${without_cuda}")
if(why_not)
  if(PRUNEOPD_CUDA STREQUAL "ON")
    message(FATAL_ERROR "PRUNEOPD_CUDA is ON, and ${why_not}")
  endif()
  file(WRITE "${without_cuda}" "${why_not}")
  return()
endif()

# Code for each architecture, and of the last one also PTX, which the driver compiles for what comes after it. 10.0 is the
# last by default, because its PTX runs on 11.0, too.
execute_process(COMMAND "${CUDAToolkit_NVCC_EXECUTABLE}" --list-gpu-code OUTPUT_VARIABLE known_to_nvcc COMMAND_ERROR_IS_FATAL ANY)
set(architectures ${PRUNEOPD_CUDA_ARCHITECTURES})
if(NOT architectures)
  foreach(architecture 80 90 120 100)
    if(known_to_nvcc MATCHES "sm_${architecture}\n")
      list(APPEND architectures ${architecture})
    endif()
  endforeach()
endif()
list(GET architectures -1 last)
list(TRANSFORM architectures REPLACE "^(.+)$" "-gencode=arch=compute_\\1,code=sm_\\1" OUTPUT_VARIABLE code_flags)
list(APPEND code_flags "-gencode=arch=compute_${last},code=compute_${last}")
list(TRANSFORM architectures PREPEND "sm_" OUTPUT_VARIABLE built_for)
list(JOIN built_for " " built_for)

# --fmad=false: a multiplication and an addition become one where the source says so. The host compiler is nvcc's own
# choice, or NVCC_CCBIN's: it knows which it can work with.
set(nvcc_flags -std=c++20 -O3 --fmad=false --expt-relaxed-constexpr ${code_flags} -I "${CMAKE_CURRENT_SOURCE_DIR}/csrc"
    -Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra,-ffp-contract=off,-ffile-prefix-map=${CMAKE_CURRENT_SOURCE_DIR}=.)
file(GLOB kernels CONFIGURE_DEPENDS csrc/cuda/*.cu)
foreach(source ${kernels})
  get_filename_component(name "${source}" NAME)
  set(object "${CMAKE_CURRENT_BINARY_DIR}/cuda/${name}.o")
  add_custom_command(
    OUTPUT "${object}"
    COMMAND "${CUDAToolkit_NVCC_EXECUTABLE}" ${nvcc_flags} -MD -MF "${object}.d" -MT "${object}" -c "${source}" -o "${object}"
    DEPENDS "${source}" DEPFILE "${object}.d" VERBATIM COMMENT "Compiling ${name} for ${built_for}")
  list(APPEND objects "${object}")
endforeach()
file(MAKE_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/cuda")

add_torch_library(_cuda csrc/torch/cuda_library.cpp ${objects})
target_compile_definitions(_cuda PRIVATE
  "PRUNEOPD_CUDA_BUILD=\"${CUDAToolkit_VERSION_MAJOR}.${CUDAToolkit_VERSION_MINOR} ${built_for} compute_${last}\"")
# The CUDA runtime is inside: no other library need be found, whatever toolkit torch has been built with. libtorch is kept
# although nothing of it is used by name: it leads to the stream's symbol, which is weak.
target_link_libraries(_cuda PRIVATE CUDA::cudart_static
  LINKER:--push-state,--no-as-needed torch LINKER:--pop-state)
