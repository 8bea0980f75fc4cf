# _gpu: the ops for GPUs, as a module of its own, so that the CPU extension neither needs nor links a vendor's runtime.
# One source for all vendors (csrc/gpu/vendor.h), compiled as `language` for its CMAKE_<language>_ARCHITECTURES.
function(batchinfer_add_gpu language vendor)
  set(architectures "${CMAKE_${language}_ARCHITECTURES}")
  set(toolkit "${BATCHINFER_TOOLKIT_VERSION}")
  if(NOT toolkit)
    set(toolkit "${CMAKE_${language}_COMPILER_VERSION}")
  endif()
  message(STATUS "batchinfer: ${language} ${toolkit} for ${architectures}")
  file(GLOB sources CONFIGURE_DEPENDS csrc/gpu/*.cu)
  set_source_files_properties(${sources} PROPERTIES LANGUAGE ${language})
  add_library(batchinfer_gpu STATIC ${sources})
  target_include_directories(batchinfer_gpu PUBLIC csrc csrc/include)
  set_target_properties(batchinfer_gpu PROPERTIES
    ${language}_ARCHITECTURES "${architectures}" ${language}_STANDARD 17 ${language}_STANDARD_REQUIRED ON
    POSITION_INDEPENDENT_CODE ON)
  pybind11_add_module(_gpu csrc/bindings/gpu.cpp)
  target_link_libraries(_gpu PRIVATE batchinfer_gpu)
  list(JOIN architectures " " architectures)
  target_compile_definitions(_gpu PRIVATE BATCHINFER_GPU_VENDOR="${vendor}" BATCHINFER_GPU_TOOLKIT="${toolkit}"
                             BATCHINFER_GPU_ARCHITECTURES="${architectures}")
  install(TARGETS _gpu LIBRARY DESTINATION batchinfer)
endfunction()
