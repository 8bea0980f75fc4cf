# _ops: the CPU backend. csrc/cpu/*.cpp is compiled for the platform's baseline; csrc/cpu/kernels/*.cpp once for every
# instruction set, in namespaces of their own (csrc/cpu/kernel_table.h says why), and chosen when the module is loaded.

include(CheckCXXCompilerFlag)

# -ffp-contract=off: a product and a sum are fused where the source says fma() and nowhere else. Left to the compiler,
#   a row in a full vector and the same row in a loop's remainder may be rounded differently, and then its tokens
#   depend on its neighbours in the batch. The sampler's arithmetic is repeated bit for bit by the reference.
# No -ffast-math for the same reason, and because it loses NaN and -inf, which mark banned tokens.
set(BATCHINFER_CPU_FLAGS -Wall -Wextra -ffp-contract=off -fno-math-errno)

function(batchinfer_add_cpu)
  find_package(Threads REQUIRED)
  file(GLOB sources CONFIGURE_DEPENDS csrc/cpu/*.cpp)
  file(GLOB kernels CONFIGURE_DEPENDS csrc/cpu/kernels/*.cpp)

  add_library(batchinfer_cpu STATIC ${sources})
  target_include_directories(batchinfer_cpu PUBLIC csrc csrc/include)
  target_compile_options(batchinfer_cpu PRIVATE ${BATCHINFER_CPU_FLAGS})
  target_link_libraries(batchinfer_cpu PUBLIC Threads::Threads)
  set_target_properties(batchinfer_cpu PROPERTIES CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)

  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
    set(isas generic avx2 avx512 avx512vnni avx512bf16 amx)
    set(flags_avx2 -mavx2 -mfma -mf16c -mbmi2)
    set(flags_avx512 ${flags_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512)
    set(flags_avx512vnni ${flags_avx512} -mavx512vnni)
    set(flags_avx512bf16 ${flags_avx512vnni} -mavx512bf16)
    set(flags_amx ${flags_avx512bf16} -mamx-tile -mamx-bf16 -mamx-int8)
  elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
    set(isas neon neondotprod neonbf16)
    set(flags_neondotprod -march=armv8.2-a+dotprod)
    set(flags_neonbf16 -march=armv8.2-a+dotprod+i8mm+bf16)
  else()
    set(isas generic)
  endif()

  set(compiled "")
  foreach(isa IN LISTS isas)
    list(JOIN flags_${isa} " " flags)
    check_cxx_compiler_flag("${flags}" BATCHINFER_COMPILES_${isa})
    if(NOT BATCHINFER_COMPILES_${isa})
      continue()
    endif()
    list(APPEND compiled ${isa})
    set(target batchinfer_cpu_${isa})
    add_library(${target} OBJECT ${kernels})
    target_include_directories(${target} PRIVATE csrc csrc/include)
    target_compile_definitions(${target} PRIVATE BATCHINFER_ISA=${isa})
    # -O3 in every build type but Debug. No vector crosses a border between libraries (psabi); GCC 12 warns about its
    # own intrinsics (uninitialized).
    target_compile_options(${target} PRIVATE ${BATCHINFER_CPU_FLAGS} ${flags_${isa}} $<$<NOT:$<CONFIG:Debug>>:-O3>
                           -Wno-psabi -Wno-uninitialized -Wno-maybe-uninitialized)
    set_target_properties(${target} PROPERTIES CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)
    target_compile_definitions(batchinfer_cpu PRIVATE BATCHINFER_HAVE_${isa})
    target_sources(batchinfer_cpu PRIVATE $<TARGET_OBJECTS:${target}>)
  endforeach()
  message(STATUS "batchinfer: CPU kernels for ${compiled}")

  pybind11_add_module(_ops csrc/bindings/ops.cpp)
  target_link_libraries(_ops PRIVATE batchinfer_cpu)
  install(TARGETS _ops LIBRARY DESTINATION batchinfer)
endfunction()
