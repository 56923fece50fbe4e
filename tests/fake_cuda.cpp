// The part of libcuda, libcublas and libnvrtc that gpu/cuda.rs calls, in host memory: kernels run on the simulator, whose text
// stands above this one when it is compiled. So the calls themselves are tested: their order, sizes, leading dimensions.
// "Devices" have 1 GiB, or RANKGRAD_FAKE_BYTES, and the kernel RANKGRAD_FAKE_FAILS, if any, fails; what NVRTC compiles is the word "image", and modules are made of nothing else.

#include <mutex>

// C ← alpha·op(A)·op(B) + beta·C, what cuBLAS computes below.
template <class T>
static int gemm(bool ta, bool tb, int m, int n, int k, const float* alpha, const T* a, int lda, const T* b, int ldb, const float* beta,
                T* c, int ldc) {
    if (m < 1 || n < 1 || k < 1 || lda < (ta ? k : m) || ldb < (tb ? n : k) || ldc < m) return 7;
    for (int j = 0; j < n; j++) {
        for (int i = 0; i < m; i++) {
            float sum = 0;
            for (int l = 0; l < k; l++) sum += a[ta ? l + i * lda : i + l * lda] * b[tb ? j + l * ldb : l + j * ldb];
            T& out = c[i + j * ldc];
            out = *beta == 0 ? *alpha * sum : *alpha * sum + *beta * out;
        }
    }
    return 0;
}

extern "C" {

// ---- libcuda; 0 is success, 1 an invalid value, 2 out of memory, 201 no context

static thread_local void* context;
static std::mutex busy;
static size_t used;
static const char* const FAILS = getenv("RANKGRAD_FAKE_FAILS");
static const char* const BYTES = getenv("RANKGRAD_FAKE_BYTES");
static const size_t TOTAL = BYTES ? strtoull(BYTES, 0, 10) : size_t(1) << 30;
const void* const STREAM = (const void*)0x5000; // the same in each of the three libraries, which are copies

int cuInit(unsigned) { return 0; }
int cuGetErrorName(int, const char** name) { return *name = "its name", 0; }
int cuGetErrorString(int, const char** words) { return *words = "its words", 0; }
int cuDeviceGetCount(int* count) { return *count = 1, 0; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, 0; }
int cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = TOTAL, 0; }
int cuDeviceGetAttribute(int* value, int which, int) { return *value = which == 75 ? 9 : which == 115 ? 1 : 0, 0; } // 9.0, pools
int cuDeviceGetName(char* name, int, int) { return strcpy(name, "Simulated"), 0; }
int cuDevicePrimaryCtxRetain(void** out, int) { return *out = (void*)"context", 0; }
int cuDevicePrimaryCtxRelease_v2(int) { return 0; }
int cuCtxSetCurrent(void* c) { return context = c, 0; }
int cuCtxGetCurrent(void** c) { return *c = context, 0; }
int cuCtxSynchronize() { return context ? 0 : 201; }
int cuStreamCreate(const void** stream, unsigned) { return *stream = STREAM, 0; }
int cuStreamDestroy_v2(const void*) { return 0; }
int cuStreamSynchronize(const void* stream) { return !context ? 201 : stream != STREAM; }
int cuDeviceGetDefaultMemPool(const void** pool, int) { return *pool = "pool", 0; }
int cuMemPoolSetAttribute(const void*, int which, const uint64_t* value) { return which != 4 || *value != UINT64_MAX; }
int cuMemGetInfo_v2(size_t* free, size_t* total) { return *free = TOTAL - used, *total = TOTAL, 0; }

int cuMemAllocAsync(uint64_t* address, size_t bytes, const void* stream) {
    if (!context) return 201;
    if (!bytes || stream != STREAM) return 1;
    std::lock_guard<std::mutex> lock(busy);
    if (used + bytes > TOTAL) return 2;
    size_t* start = (size_t*)aligned_alloc(256, (256 + bytes + 255) / 256 * 256);
    memset(start, 0xff, 256 + bytes);
    used += *start = bytes;
    return *address = (uint64_t)start + 256, 0;
}
int cuMemFreeAsync(uint64_t address, const void* stream) {
    if (!context) return 201;
    if (stream != STREAM) return 1;
    std::lock_guard<std::mutex> lock(busy);
    size_t* start = (size_t*)(address - 256);
    used -= *start;
    return free(start), 0;
}
static int copy(void* to, const void* from, size_t bytes, const void* stream) {
    return !context ? 201 : stream != STREAM ? 1 : (memcpy(to, from, bytes), 0);
}
int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t n, const void* s) { return copy((void*)to, from, n, s); }
int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t n, const void* s) { return copy(to, (void*)from, n, s); }
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t n, const void* s) { return copy((void*)to, (void*)from, n, s); }
int cuMemsetD8Async(uint64_t to, unsigned char value, size_t n, const void* s) {
    return !context ? 201 : s != STREAM ? 1 : (memset((void*)to, value, n), 0);
}

struct Function {
    char name[64];
    size_t shared; // allowed
};
int cuModuleLoadData(const void** module, const char* image) {
    return memcmp(image, "image", 5) ? 200 : (*module = "module", 0);
}
int cuModuleUnload(const void*) { return 0; }
int cuModuleGetFunction(Function** function, const void*, const char* name) {
    *function = new Function{{}, 48 << 10};
    return strcpy((*function)->name, name), 0;
}
int cuFuncSetAttribute(Function* function, int which, int value) {
    return which != 8 || value > (227 << 10) ? 1 : (function->shared = value, 0);
}
const char* simulate(const char*, const unsigned*, unsigned, size_t, unsigned, void**, size_t);
int cuLaunchKernel(Function* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   const void* stream, void** args, void** extra) {
    if (!context) return 201;
    if (!gx || !gy || !gz || by != 1 || bz != 1 || shared > function->shared || stream != STREAM || extra) return 1;
    if (FAILS && !strcmp(FAILS, function->name)) return 700;
    const unsigned grid[3] = {gx, gy, gz};
    static thread_local unsigned schedule;
    return simulate(function->name, grid, bx, shared, schedule++, args, simulator::ANY_COUNT) ? 700 : 0;
}

// ---- libcublas, by columns: element (i, j) of a matrix lies at i + j·ld

int cublasCreate_v2(const void** handle) { return *handle = "handle", 0; }
int cublasDestroy_v2(const void*) { return 0; }
int cublasSetStream_v2(const void*, const void* stream) { return stream != STREAM; }
int cublasSetMathMode(const void*, int mode) { return mode != 16; } // no sum of bf16 products in bf16
int cublasGemmEx(const void*, int opa, int opb, int m, int n, int k, const float* alpha, const void* a, int at, int lda, const void* b,
                 int bt, int ldb, const float* beta, void* c, int ct, int ldc, int compute, int) {
    const bool ta = opa == 1, tb = opb == 1;
    if (at != bt || at != ct || compute != 68) return 7; // CUDA_R_32F is 0, CUDA_R_16BF 14, CUBLAS_COMPUTE_32F 68
    if (at == 0) return gemm(ta, tb, m, n, k, alpha, (const float*)a, lda, (const float*)b, ldb, beta, (float*)c, ldc);
    if (at == 14) return gemm(ta, tb, m, n, k, alpha, (const Bf16*)a, lda, (const Bf16*)b, ldb, beta, (Bf16*)c, ldc);
    return 7;
}
int cublasGemmBatchedEx(const void* handle, int opa, int opb, int m, int n, int k, const float* alpha, const void* const* a, int at,
                        int lda, const void* const* b, int bt, int ldb, const float* beta, void* const* c, int ct, int ldc, int count,
                        int compute, int algorithm) {
    int code = 0;
    for (int i = 0; i < count; i++)
        code |= cublasGemmEx(handle, opa, opb, m, n, k, alpha, a[i], at, lda, b[i], bt, ldb, beta, c[i], ct, ldc, compute, algorithm);
    return code;
}

// ---- libnvrtc

int nvrtcVersion(int* major, int* minor) { return *major = 0, *minor = 1, 0; }
int nvrtcCreateProgram(const void** program, const char*, const char*, int, const void*, const void*) { return *program = "", 0; }
int nvrtcCompileProgram(const void*, int count, const char* const* options) {
    return count < 1 || strcmp(options[0], "--gpu-architecture=sm_90");
}
int nvrtcGetCUBINSize(const void*, size_t* size) { return *size = 5, 0; }
int nvrtcGetCUBIN(const void*, char* image) { return memcpy(image, "image", 5), 0; }
int nvrtcDestroyProgram(const void*) { return 0; }

} // extern "C"
