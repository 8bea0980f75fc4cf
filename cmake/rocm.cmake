# The build for AMD GPUs: the same sources, compiled as HIP by the clang of ROCm (CMake takes no hipcc for that language).
# Architectures: -DCMAKE_HIP_ARCHITECTURES, else MI200, MI300 and Radeon RX 7900.
set(BATCHINFER_ROCM_WANTED 6.3)

# Where ROCm's HIP is: CMAKE_HIP_COMPILER_ROCM_ROOT, ROCM_PATH, HIP_PATH, or around the hipcc in PATH; the first with
# its headers. Never a folder that nobody named.
function(batchinfer_find_rocm out version_out)
  find_program(hipcc NAMES hipcc NO_CACHE NO_CMAKE_SYSTEM_PATH)
  if(hipcc)
    file(REAL_PATH "${hipcc}" hipcc)
    cmake_path(GET hipcc PARENT_PATH hipcc)
    cmake_path(GET hipcc PARENT_PATH hipcc)
  endif()
  set(header include/hip/hip_version.h)
  foreach(root IN ITEMS "${CMAKE_HIP_COMPILER_ROCM_ROOT}" "$ENV{ROCM_PATH}" "$ENV{HIP_PATH}" "${hipcc}")
    if(root AND EXISTS "${root}/${header}")
      file(STRINGS "${root}/${header}" defines REGEX "define +HIP_VERSION_(MAJOR|MINOR) ")
      list(TRANSFORM defines REPLACE "^.*HIP_VERSION_[A-Z]+ +([0-9]+).*$" "\\1")
      list(JOIN defines "." version)
      set(${out} "${root}" PARENT_SCOPE)
      set(${version_out} "${version}" PARENT_SCOPE)
      return()
    endif()
  endforeach()
  message(FATAL_ERROR "BATCHINFER_DEVICE=rocm: there is no ROCm (${header}) in ROCM_PATH or HIP_PATH, nor around a hipcc "
                      "in PATH. Load the ROCm module of this site, or build for the CPU: BATCHINFER_DEVICE=cpu pip install .")
endfunction()

# A macro, as enable_language leaves its variables in the caller's scope.
macro(batchinfer_add_rocm)
  batchinfer_find_rocm(CMAKE_HIP_COMPILER_ROCM_ROOT BATCHINFER_TOOLKIT_VERSION)
  if(BATCHINFER_TOOLKIT_VERSION VERSION_LESS BATCHINFER_ROCM_WANTED)
    message(FATAL_ERROR "BATCHINFER_DEVICE=rocm: ROCm ${BATCHINFER_TOOLKIT_VERSION} in ${CMAKE_HIP_COMPILER_ROCM_ROOT} is "
                        "too old: ${BATCHINFER_ROCM_WANTED} or newer is wanted. Load that module, or set ROCM_PATH")
  endif()
  if(NOT CMAKE_HIP_COMPILER AND NOT DEFINED ENV{HIPCXX})
    set(BATCHINFER_ROCM_BIN "${CMAKE_HIP_COMPILER_ROCM_ROOT}/llvm/bin" "${CMAKE_HIP_COMPILER_ROCM_ROOT}/lib/llvm/bin"
        "${CMAKE_HIP_COMPILER_ROCM_ROOT}/bin")
    find_program(CMAKE_HIP_COMPILER NAMES amdclang++ clang++ PATHS ${BATCHINFER_ROCM_BIN} NO_DEFAULT_PATH)
    if(NOT CMAKE_HIP_COMPILER)
      message(FATAL_ERROR "BATCHINFER_DEVICE=rocm: there is no amdclang++ or clang++ in ${BATCHINFER_ROCM_BIN}: name one "
                          "with HIPCXX")
    endif()
  endif()
  set(CMAKE_HIP_PLATFORM amd) # CMake would ask hipconfig, which takes a machine with nvcc for NVIDIA's
  if(NOT CMAKE_HIP_ARCHITECTURES)
    set(CMAKE_HIP_ARCHITECTURES gfx90a gfx942 gfx1100)
  endif()
  enable_language(HIP)
  batchinfer_add_gpu(HIP rocm)
  target_compile_options(batchinfer_gpu PRIVATE -Wall)
  target_link_libraries(_gpu PRIVATE hip-lang::amdhip64)
  set_target_properties(_gpu PROPERTIES LINKER_LANGUAGE CXX)
endmacro()
