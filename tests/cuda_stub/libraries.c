/* cuBLAS and NCCL of the stub: handles, one heuristic, and communicators that one process fills alone. */
/* The headers of half floats need C++. */
#define __CUDA_FP16_H__
#define __CUDA_BF16_H__
typedef struct { unsigned short bits; } __half;
typedef __half __nv_bfloat16;
#include <cublasLt.h>
#include <cublas_v2.h>
#include <nccl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

extern void stub_count(const char *name); /* runtime.c */

/* ---- cuBLAS ------------------------------------------------------------------------------------------------------- */

#define PRODUCT(name) stub_count(name); return CUBLAS_STATUS_SUCCESS
#define DONE return CUBLAS_STATUS_SUCCESS
static uintptr_t handles = 2 << 20;

cublasStatus_t cublasCreate(cublasHandle_t *handle) { *handle = (cublasHandle_t)++handles; DONE; }
cublasStatus_t cublasDestroy(cublasHandle_t handle) { DONE; }
cublasStatus_t cublasSetStream(cublasHandle_t handle, cudaStream_t stream) { DONE; }
cublasStatus_t cublasSetWorkspace(cublasHandle_t handle, void *space, size_t size) { DONE; }
cublasStatus_t cublasSetMathMode(cublasHandle_t handle, cublasMath_t mode) { DONE; }
cublasStatus_t cublasGetMathMode(cublasHandle_t handle, cublasMath_t *mode) { *mode = CUBLAS_DEFAULT_MATH; DONE; }
cublasStatus_t cublasSetPointerMode(cublasHandle_t handle, cublasPointerMode_t mode) { DONE; }
cublasStatus_t cublasGetPointerMode(cublasHandle_t handle, cublasPointerMode_t *mode) {
    *mode = CUBLAS_POINTER_MODE_HOST;
    DONE;
}
cublasStatus_t cublasSetSmCountTarget(cublasHandle_t handle, int count) { DONE; }

cublasStatus_t cublasSgemm(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
                           const float *alpha, const float *a, int lda, const float *b, int ldb, const float *beta,
                           float *c, int ldc) { PRODUCT("gemm fp32"); }
cublasStatus_t cublasSgemv(cublasHandle_t handle, cublasOperation_t trans, int m, int n, const float *alpha,
                           const float *a, int lda, const float *x, int incx, const float *beta, float *y, int incy) {
    PRODUCT("gemv fp32");
}
cublasStatus_t cublasSgemmStridedBatched(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m, int n,
                                         int k, const float *alpha, const float *a, int lda, long long sa, const float *b,
                                         int ldb, long long sb, const float *beta, float *c, int ldc, long long sc,
                                         int count) { PRODUCT("gemm fp32 batched"); }
cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
                            const void *alpha, const void *a, cudaDataType at, int lda, const void *b, cudaDataType bt,
                            int ldb, const void *beta, void *c, cudaDataType ct, int ldc, cublasComputeType_t compute,
                            cublasGemmAlgo_t algorithm) {
    PRODUCT(at == CUDA_R_16BF ? "gemm bf16" : "gemm");
}
cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m, int n,
                                          int k, const void *alpha, const void *a, cudaDataType at, int lda, long long sa,
                                          const void *b, cudaDataType bt, int ldb, long long sb, const void *beta,
                                          void *c, cudaDataType ct, int ldc, long long sc, int count,
                                          cublasComputeType_t compute, cublasGemmAlgo_t algorithm) {
    PRODUCT(at == CUDA_R_16BF ? "gemm bf16 batched" : "gemm batched");
}
cublasStatus_t cublasSdot(cublasHandle_t handle, int n, const float *x, int incx, const float *y, int incy, float *result) {
    PRODUCT("dot");
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *it, cublasComputeType_t compute, cudaDataType_t scale) {
    *it = (cublasLtMatmulDesc_t)++handles;
    DONE;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t it) { DONE; }
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t it, cublasLtMatmulDescAttributes_t attribute,
                                              const void *value, size_t size) { DONE; }
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *it, cudaDataType type, uint64_t rows, uint64_t columns,
                                          int64_t ld) {
    *it = (cublasLtMatrixLayout_t)++handles;
    DONE;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t it) { DONE; }
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t it, cublasLtMatrixLayoutAttribute_t attribute,
                                                const void *value, size_t size) { DONE; }
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *it) {
    *it = (cublasLtMatmulPreference_t)++handles;
    DONE;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t it) { DONE; }
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t it,
                                                    cublasLtMatmulPreferenceAttributes_t attribute, const void *value,
                                                    size_t size) { DONE; }
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t operation,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c,
                                              cublasLtMatrixLayout_t d, cublasLtMatmulPreference_t preference, int wanted,
                                              cublasLtMatmulHeuristicResult_t results[], int *count) {
    memset(results, 0, sizeof *results);
    results[0].state = CUBLAS_STATUS_SUCCESS;
    *count = 1;
    DONE;
}
cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t operation, const void *alpha, const void *a,
                              cublasLtMatrixLayout_t at, const void *b, cublasLtMatrixLayout_t bt, const void *beta,
                              const void *c, cublasLtMatrixLayout_t ct, void *d, cublasLtMatrixLayout_t dt,
                              const cublasLtMatmulAlgo_t *algorithm, void *space, size_t size, cudaStream_t stream) {
    PRODUCT("gemm with bias");
}

/* ---- NCCL: this process is one rank, the others exist by name only --------------------------------------------------- */

struct ncclComm { int rank, size; };

static ncclResult_t communicator(ncclComm_t *it, int size, int rank) {
    *it = malloc(sizeof **it);
    (*it)->size = size;
    (*it)->rank = rank;
    return ncclSuccess;
}
ncclResult_t ncclGetVersion(int *version) { *version = NCCL_VERSION_CODE; return ncclSuccess; }
ncclResult_t ncclGetUniqueId(ncclUniqueId *id) { memset(id, 1, sizeof *id); return ncclSuccess; }
ncclResult_t ncclCommInitRank(ncclComm_t *it, int size, ncclUniqueId id, int rank) { return communicator(it, size, rank); }
ncclResult_t ncclCommInitRankConfig(ncclComm_t *it, int size, ncclUniqueId id, int rank, ncclConfig_t *configuration) {
    return communicator(it, size, rank);
}
ncclResult_t ncclCommInitRankScalable(ncclComm_t *it, int size, int rank, int count, ncclUniqueId *ids,
                                      ncclConfig_t *configuration) { return communicator(it, size, rank); }
ncclResult_t ncclCommSplit(ncclComm_t it, int color, int key, ncclComm_t *split, ncclConfig_t *configuration) {
    stub_count("ncclCommSplit");
    return communicator(split, it->size, key); /* nobody tells NCCL how many ranks have the colour */
}
ncclResult_t ncclCommFinalize(ncclComm_t it) { return ncclSuccess; }
ncclResult_t ncclCommDestroy(ncclComm_t it) { return ncclSuccess; }
ncclResult_t ncclCommAbort(ncclComm_t it) { return ncclSuccess; }
ncclResult_t ncclCommCount(const ncclComm_t it, int *count) { *count = it->size; return ncclSuccess; }
ncclResult_t ncclCommUserRank(const ncclComm_t it, int *rank) { *rank = it->rank; return ncclSuccess; }
ncclResult_t ncclCommGetAsyncError(ncclComm_t it, ncclResult_t *error) { *error = ncclSuccess; return ncclSuccess; }
ncclResult_t ncclCommRegister(const ncclComm_t it, void *start, size_t size, void **handle) { return ncclSuccess; }
ncclResult_t ncclCommDeregister(const ncclComm_t it, void *handle) { return ncclSuccess; }
const char *ncclGetErrorString(ncclResult_t error) { return "an error of the stub"; }
const char *ncclGetLastError(ncclComm_t it) { return ""; }
ncclResult_t ncclGroupStart(void) { return ncclSuccess; }
ncclResult_t ncclGroupEnd(void) { return ncclSuccess; }
ncclResult_t ncclSend(const void *from, size_t count, ncclDataType_t type, int peer, ncclComm_t it,
                      cudaStream_t stream) { stub_count("ncclSend"); return ncclSuccess; }
ncclResult_t ncclRecv(void *to, size_t count, ncclDataType_t type, int peer, ncclComm_t it,
                      cudaStream_t stream) { stub_count("ncclRecv"); return ncclSuccess; }
ncclResult_t ncclAllReduce(const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t op, ncclComm_t it,
                           cudaStream_t stream) { stub_count("ncclAllReduce"); return ncclSuccess; }
ncclResult_t ncclAllGather(const void *from, void *to, size_t count, ncclDataType_t type, ncclComm_t it,
                           cudaStream_t stream) { stub_count("ncclAllGather"); return ncclSuccess; }
ncclResult_t ncclReduceScatter(const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t op,
                               ncclComm_t it, cudaStream_t stream) {
    stub_count("ncclReduceScatter");
    return ncclSuccess;
}
ncclResult_t ncclBroadcast(const void *from, void *to, size_t count, ncclDataType_t type, int root, ncclComm_t it,
                           cudaStream_t stream) { stub_count("ncclBroadcast"); return ncclSuccess; }
ncclResult_t ncclRedOpCreatePreMulSum(ncclRedOp_t *op, void *scalar, ncclDataType_t type, ncclScalarResidence_t residence,
                                      ncclComm_t it) { *op = ncclSum; return ncclSuccess; }
ncclResult_t ncclRedOpDestroy(ncclRedOp_t op, ncclComm_t it) { return ncclSuccess; }
