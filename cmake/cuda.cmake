# The build for NVIDIA GPUs.
#
# Architectures: -DCMAKE_CUDA_ARCHITECTURES, else what this nvcc knows of 7.0 to 10.0. CUDA 13 no longer compiles for 7.0;
# the newest also travels as PTX, for GPUs that come later. 9.0 is always built as 90a, which has the warpgroup products of
# the sources named *_sm90.cu and runs on every GPU of 9.0 (from CUDA 12 on).
function(batchinfer_cuda_architectures out)
  execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-arch OUTPUT_VARIABLE known ERROR_QUIET)
  set(chosen "")
  set(missing "")
  set(newest "")
  foreach(arch IN ITEMS 70 75 80 86 89 90 100)
    if(known MATCHES "compute_${arch}\n")
      list(APPEND chosen "${arch}-real")
      set(newest "${arch}")
    else()
      list(APPEND missing "${arch}")
    endif()
  endforeach()
  if(NOT chosen) # a compiler without --list-gpu-arch
    set(chosen "80-real" "90-real")
    set(newest "90")
  elseif(missing)
    message(STATUS "batchinfer: this nvcc has no code for compute capability ${missing}; left out")
  endif()
  list(APPEND chosen "${newest}-virtual")
  set(${out} "${chosen}" PARENT_SCOPE)
endfunction()

# A macro, to be called from the top CMakeLists.txt: enable_language leaves its variables in the caller's scope.
macro(batchinfer_add_cuda)
  batchinfer_find_nvcc(BATCHINFER_NVCC)
  if(NOT BATCHINFER_NVCC)
    message(FATAL_ERROR "BATCHINFER_DEVICE=cuda: there is no CUDA compiler in CUDACXX, CUDA_HOME/bin or PATH. Load the "
                        "CUDA module of this site, or build for the CPU: BATCHINFER_DEVICE=cpu pip install .")
  endif()
  set(CMAKE_CUDA_COMPILER "${BATCHINFER_NVCC}")
  if(NOT CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
    # enable_language would store a default of its own, and hide that none was given.
    set(CMAKE_CUDA_ARCHITECTURES OFF)
    set(BATCHINFER_CHOOSES_ARCHITECTURES ON)
  endif()
  enable_language(CUDA)
  if(BATCHINFER_CHOOSES_ARCHITECTURES)
    batchinfer_cuda_architectures(CMAKE_CUDA_ARCHITECTURES)
  endif()
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.0) # 11.8 knows 9.0 but not 90a: the general kernels then
    list(TRANSFORM CMAKE_CUDA_ARCHITECTURES REPLACE "^90a?(-real)?$" "90a-real")
  endif()
  batchinfer_add_gpu(CUDA cuda)
  target_compile_options(batchinfer_gpu PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall>")
  if("90a-real" IN_LIST CMAKE_CUDA_ARCHITECTURES)
    target_compile_definitions(batchinfer_gpu PRIVATE BATCHINFER_SM90A)
  endif()
  set_target_properties(batchinfer_gpu _gpu PROPERTIES CUDA_RUNTIME_LIBRARY Static)
endmacro()
