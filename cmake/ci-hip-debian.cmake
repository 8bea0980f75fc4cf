# A toolchain file for CI: ROCm is in no registry that CI reaches, and this stands for it. Debian's clang 19, HIP runtime
# and device libraries, and the HIP 7.1 headers that Triton's wheel carries. The result links and imports; it ran on no GPU.
#
#   apt-get install --no-install-recommends clang-19 lld-19 clang-tools-19 libamdhip64-dev rocm-device-libs
#   cmake -DCMAKE_TOOLCHAIN_FILE=cmake/ci-hip-debian.cmake -DBATCHINFER_HIP_HEADERS=.../triton/backends/amd/include ...
# as `make hip-check` does it.
if(NOT BATCHINFER_HIP_ROOT)
  set(BATCHINFER_HIP_ROOT "${CMAKE_BINARY_DIR}/rocm")
endif()
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES BATCHINFER_HIP_ROOT BATCHINFER_HIP_HEADERS)

set(CMAKE_HIP_COMPILER /usr/bin/clang++-19)
set(CMAKE_HIP_COMPILER_ROCM_ROOT "${BATCHINFER_HIP_ROOT}")
set(CMAKE_HIP_COMPILER_ROCM_LIB "${BATCHINFER_HIP_ROOT}/lib")
set(CMAKE_HIP_FLAGS_INIT "--rocm-path=${BATCHINFER_HIP_ROOT} --rocm-device-lib-path=${BATCHINFER_HIP_ROOT}/bitcode \
-isystem ${BATCHINFER_HIP_ROOT}/include -mcode-object-version=5")

if(EXISTS "${BATCHINFER_HIP_ROOT}/done")
  return()
endif()
if(NOT EXISTS "${BATCHINFER_HIP_HEADERS}/hip/hip_version.h")
  message(FATAL_ERROR "BATCHINFER_HIP_HEADERS=${BATCHINFER_HIP_HEADERS} has no hip/hip_version.h: name the folder of "
                      "Triton's wheel, triton/backends/amd/include")
endif()
set(bitcode /usr/lib/x86_64-linux-gnu/amdgcn/bitcode)
file(GLOB libraries ${bitcode}/*.bc)
file(COPY ${libraries} DESTINATION "${BATCHINFER_HIP_ROOT}/bitcode")
# Debian's device libraries are older than these two targets. What is special to one of them is a constant, its number.
foreach(target IN ITEMS 942:9402 1100:11000)
  string(REPLACE ":" ";" target ${target})
  list(POP_FRONT target name number)
  set(source "${BATCHINFER_HIP_ROOT}/bitcode/${name}.ll")
  file(WRITE ${source} "target triple = \"amdgcn-amd-amdhsa\"\n@__oclc_ISA_version = linkonce_odr protected \
local_unnamed_addr addrspace(4) constant i32 ${number}, align 4\n")
  execute_process(COMMAND ${CMAKE_HIP_COMPILER} -x ir ${source} -c -emit-llvm -target amdgcn-amd-amdhsa -nogpulib
                          -Wno-override-module -o "${BATCHINFER_HIP_ROOT}/bitcode/oclc_isa_version_${name}.bc"
                  COMMAND_ERROR_IS_FATAL ANY)
endforeach()
file(MAKE_DIRECTORY "${BATCHINFER_HIP_ROOT}/lib/cmake/hip-lang")
file(CREATE_LINK "${BATCHINFER_HIP_HEADERS}" "${BATCHINFER_HIP_ROOT}/include" SYMBOLIC)
# Without it clang takes the folder for no ROCm, and does not include its wrapper of HIP's headers.
file(STRINGS "${BATCHINFER_HIP_HEADERS}/hip/hip_version.h" versions REGEX "define HIP_VERSION_(MAJOR|MINOR|PATCH) ")
list(TRANSFORM versions REPLACE "^#define (HIP_VERSION_[A-Z]+) +([0-9]+).*$" "\\1=\\2\n")
file(WRITE "${BATCHINFER_HIP_ROOT}/share/hip/version" ${versions})
file(CREATE_LINK /usr/lib/x86_64-linux-gnu/libamdhip64.so "${BATCHINFER_HIP_ROOT}/lib/libamdhip64.so" SYMBOLIC)
file(WRITE "${BATCHINFER_HIP_ROOT}/lib/cmake/hip-lang/hip-lang-config.cmake" [[
get_filename_component(root "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
if(NOT TARGET hip-lang::amdhip64)
  add_library(hip-lang::amdhip64 SHARED IMPORTED)
  set_target_properties(hip-lang::amdhip64 PROPERTIES IMPORTED_LOCATION "${root}/lib/libamdhip64.so")
  add_library(hip-lang::device INTERFACE IMPORTED)
  set_target_properties(hip-lang::device PROPERTIES INTERFACE_LINK_LIBRARIES hip-lang::amdhip64)
endif()
]])
file(TOUCH "${BATCHINFER_HIP_ROOT}/done")
